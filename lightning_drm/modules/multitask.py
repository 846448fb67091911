"""The merged model: every task's own module around one shared backbone.

Under a strategy that shards, the blocks of the backbone are sharded and the rest, heads included, is whole on every
rank.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any, Self

import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_drm.data.sharing import Share, exactness_problem, num_replicas
from lightning_drm.deltas import backbone_parameters
from lightning_drm.deltas.adapters import AdapterParameters, adapter_parameters, attach_adapter
from lightning_drm.deltas.wrappers import refuse_divided, refuse_flat
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.kinds import MetricInfo
from lightning_drm.merging import LowRank
from lightning_drm.modules.batch_norm import batch_norms, estimated, set_statistics
from lightning_drm.modules.duplicate import duplicate
from lightning_drm.modules.measurement import EQUAL, Measurement
from lightning_drm.modules.merged_shards import take_up
from lightning_drm.modules.own_hooks import BATCH_HOOKS, has_hook
from lightning_drm.modules.protocol import classify, head_names_of
from lightning_drm.modules.reused_layers import reuse_layers
from lightning_drm.modules.sample_states import SampleStates
from lightning_drm.modules.sharding import data_parallel, is_sharded, shard_blocks
from lightning_drm.modules.task_copies import as_parameter, copy_with


class MultiTaskModule(LightningModule):
    """Several tasks' modules around one backbone; a batch goes to the one of its ``dataloader_idx``.

    Each task is tested by its own ``test_step``, or by its logits (see `lightning_drm.modules.measurement`): logged are
    ``score/<task>``, and ``<metric>/<task>`` for every metric. Under several processes, samples that a
    ``DistributedSampler`` repeats to give every process as many do not count, and loaders that make this impossible are
    refused. `FSDPStrategy` (FSDP1) keeps what it shards: it can test this module once.

    Args:
        modules: Module by task, in the order of the test dataloaders. Usually made by `assemble`.

    Attributes:
        record_samples: Whether tests record each sample's part in the scores, for `samples`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.task_names = list(modules)
        # Lists, not dicts: a ModuleDict refuses names with dots and those of its own methods.
        self.task_modules = nn.ModuleList(modules.values())
        self.record_samples = False
        self._measurements = [Measurement(task, module) for task, module in modules.items()]
        self._samples: dict[str, SampleStates | None] = {}
        self.metrics_on_logits = nn.ModuleList(measurement.metrics for measurement in self._measurements)
        for hook in BATCH_HOOKS:
            if any(has_hook(hook, module) for module in modules.values()):  # else Lightning would warn of two owners
                setattr(self, hook, partial(self._batch_hook, hook))
        self.eval()

    @classmethod
    def assemble(
        cls,
        modules: Mapping[str, nn.Module],
        backbone: Mapping[str, Tensor] | None = None,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        head: Sequence[str] | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        factors: Mapping[str, LowRank] | None = None,
    ) -> Self:
        """Builds the module from copies of the tasks' modules; the modules themselves stay as they are.

        Each copy keeps what its author gave it (hyper-parameters, metrics, label maps, loss), and all of them compute
        with one backbone.

        Args:
            modules: By task, its own module. Their parameters may be on torch's meta device where `backbone` and
                `heads` replace them.
            backbone: Backbone tensors by name. They are used, not copied, and shared by all tasks; those that are left
                out are the first module's own. If some are sharded, so are the modules' blocks in the end, and all
                ranks call this together.
            heads: By task, its head's tensors by name, which are copied; each module's own if left out.
            head: Names of the head; each module's own ``head_names`` if left out.
            statistics: By task, running statistics of its batch norms by name, which are copied; those of the backbone
                and the head if left out.
            factors: By name, low-rank deltas that are added to weights of the backbone as an adapter, as they must be
                where the weights are quantized.

        Returns:
            A module with one backbone in memory, without the modules' own adapters.

        Raises:
            ValueError: If a head's tensors are not those of its module's head, or statistics fit no batch norm.
        """
        backbone, heads = backbone or {}, heads or {}
        sharded = {name: tensor for name, tensor in backbone.items() if isinstance(tensor, DTensor)}
        places = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in sharded.items()}
        first = next(iter(modules.values()))
        own = backbone_parameters(first, head_names_of(first, head))
        plain = {**backbone, **places}
        shared = {name: as_parameter(plain.get(name, p.tensor), p.tensor) for name, p in own.items()}
        copies: dict[str, nn.Module] = {}
        adapter: dict[str, AdapterParameters] = {}
        for task, module in modules.items():
            copies[task] = copy_with(module, head_names_of(module, head), shared, heads.get(task))
            own_head = head_names_of(module, head)
            adapter = adapter or adapter_parameters(copies[task], own_head, factors or {})
            attach_adapter(copies[task], own_head, adapter)
            set_statistics(copies[task], (statistics or {}).get(task, {}))
            if len(copies) > 1:
                reuse_layers(next(iter(copies.values())), copies[task])
        assembled = cls(copies)
        if sharded:
            take_up(list(assembled.task_modules), sharded, shared)
        return assembled

    def task_module(self, task: str) -> nn.Module:
        """One task's own module, as its author wrote it, around the shared backbone.

        Args:
            task: The task's name.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.task_names:
            raise KeyError(f"No task {task!r}; tasks: {', '.join(self.task_names)}.")
        return self.task_modules[self.task_names.index(task)]

    def reestimate_batch_norm(self, batches: Mapping[str, Iterable[Any]], *, max_batches: int | None = None) -> None:
        """Gives batch norms the running statistics of tasks' own batches, which those of the merge do not fit.

        Each named task has statistics of its own from then on, as `task_module` then gives a new module. Under several
        processes all of them call it, each with batches of its own.

        Args:
            batches: By task, batches of its training data, such as a `torch.utils.data.DataLoader`.
            max_batches: How many batches of each may be used; all if left out.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there are no batches, or the module is sharded.
        """
        if is_sharded(self):
            raise ValueError(
                "Statistics of a sharded merged model cannot be taken apart: give the batches to MergeSession.fuse."
            )
        found = self.estimate_batch_norm(batches, max_batches=max_batches, ranks=Ranks.of_process_group())
        for task, statistics in found.items():
            module = self.task_module(task)
            tensors = [*module.parameters(), *module.buffers()]
            own = duplicate(module, {id(tensor): tensor for tensor in tensors})
            set_statistics(own, statistics)
            index = self.task_names.index(task)
            self.task_modules[index], self._measurements[index] = own, Measurement(task, own)
            self.metrics_on_logits[index] = self._measurements[index].metrics.eval()

    def estimate_batch_norm(
        self,
        batches: Mapping[str, Iterable[Any]],
        *,
        max_batches: int | None = None,
        layers: Mapping[str, Set[str]] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, dict[str, Tensor]]:
        """Estimates what `reestimate_batch_norm` sets; see `batch_norm`. The module stays as it is.

        Args:
            batches: By task, batches of its training data.
            max_batches: How many batches of each may be used; all if left out.
            layers: By task, the names of the running means that are wanted; all if left out.
            ranks: The processes, each with batches of its own.

        Returns:
            By task, its statistics by name of the buffer; nothing of tasks with nothing to estimate, whose batches are
            not asked for.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there are no batches.
        """
        found = {}
        for task, own in batches.items():
            wanted = {
                name: layer
                for name, layer in batch_norms(self.task_module(task)).items()
                if layers is None or f"{name}.running_mean" in layers.get(task, ())
            }
            if not wanted:
                continue
            device = next(self.parameters()).device
            try:
                here = (move_data_to_device(batch, device) for batch in itertools.islice(own, max_batches))
                found[task] = estimated(self.task_module(task), wanted, here, ranks)
            except (ValueError, TypeError) as error:
                raise ValueError(f"Task {task!r}: {error}") from error
        return found

    @override
    def configure_model(self) -> None:
        refuse_flat(self)  # before a strategy wraps it
        if self.device_mesh is not None and not is_sharded(self):
            self.shard(data_parallel(self.device_mesh))

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards the blocks of all tasks' modules; all ranks do so together.

        Args:
            mesh: The ranks.
        """
        for module in self.task_modules:
            shard_blocks(module, mesh)

    @override
    def forward(self, batch: Any, task: str) -> Tensor:
        """Logits ``(batch, classes)`` of a batch of one task."""
        return classify(self.task_module(task), batch)[0]

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, batch_idx, dataloader_idx)

    def metric_of(self, task: str) -> MetricInfo:
        """How to read a task's score, once it was tested.

        Args:
            task: The task's name.

        Raises:
            RuntimeError: If it was not tested yet.
        """
        info = self._measurements[self.task_names.index(task)].info
        if info is None:
            raise RuntimeError(f"Task {task!r} was not tested yet.")
        return info

    def samples(self, task: str) -> SampleStates | None:
        """Each test sample's part in a task's score; ``None`` if tests did not record it, or cannot.

        Args:
            task: The task's name.
        """
        return self._samples.get(task)

    @override
    def on_validation_epoch_start(self) -> None:
        self._start()

    @override
    def on_test_epoch_start(self) -> None:
        self._start()

    @override
    def on_validation_epoch_end(self) -> None:
        self._finish()

    @override
    def on_test_epoch_end(self) -> None:
        self._finish()

    def _start(self) -> None:
        self._samples.clear()
        refuse_divided(self)
        for dataloader_idx, measurement in enumerate(self._measurements):
            loader = self._loader(dataloader_idx)
            if num_replicas(self.trainer) > 1 and (problem := exactness_problem(loader)):
                raise ValueError(f"Task {measurement.task!r} has an evaluation loader that {problem}.")
            measurement.start(record=self.record_samples)
            measurement.hook("on_test_start", self.trainer)
            measurement.hook("on_test_epoch_start", self.trainer)

    def _measure(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        share = Share.of(self._loader(dataloader_idx), batch_idx)
        self._measurements[dataloader_idx].measure(batch, batch_idx, share, self._log_score, self.trainer)

    def _finish(self) -> None:
        for measurement in self._measurements:
            measurement.finish(self._log_score, self.trainer, self.all_gather)
            self._samples[measurement.task] = measurement.samples()
            measurement.hook("on_test_end", self.trainer)

    def _log_score(self, name: str, value: Metric | Tensor) -> None:
        options: dict[str, Any] = {"metric_attribute": name} if isinstance(value, Metric) else EQUAL
        self.log(name, value, on_step=False, on_epoch=True, add_dataloader_idx=False, batch_size=1, **options)

    def _batch_hook(self, hook: str, *args: Any) -> Any:
        """Calls a batch's hook as if its task were alone; `args` end with the ``dataloader_idx``."""
        module = self.task_modules[args[-1]]
        if has_hook(hook, module):
            return getattr(module, hook)(*args[:-1], 0)
        return getattr(LightningModule, hook)(self, *args)

    def _loader(self, dataloader_idx: int) -> Any:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        return loaders[dataloader_idx] if isinstance(loaders, Sequence) else loaders
