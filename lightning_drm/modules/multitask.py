"""The merged model: one backbone, one head per task.

The tasks' modules share the backbone's layers, not only their tensors, so that each layer can be sharded once. Under a
strategy that shards, the blocks of the backbone are sharded and the rest, heads included, is whole on every rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_drm.data.padding import exactness_problem, num_replicas, repeated
from lightning_drm.deltas import backbone_parameters, head_state, remove_adapters
from lightning_drm.deltas.sharded import shard_like, whole
from lightning_drm.deltas.wrappers import refuse_divided, refuse_flat
from lightning_drm.modules.duplicate import duplicate
from lightning_drm.modules.protocol import IGNORE_INDEX, classify
from lightning_drm.modules.sharding import data_parallel, is_sharded, shard_blocks


class MultiTaskModule(LightningModule):
    """Several tasks' modules around one backbone; a batch goes to the one of its ``dataloader_idx``.

    Under several processes, samples that a ``DistributedSampler`` repeats to give every process as many do not count,
    and loaders that make this impossible are refused. `FSDPStrategy` (FSDP1) keeps what it shards: it can test this
    module once.

    Args:
        modules: Module by task, in the order of the test dataloaders. Usually made by `assemble`.
    """

    def __init__(self, modules: Mapping[str, LightningModule]) -> None:
        super().__init__()
        self.task_names = list(modules)
        # Lists, not dicts: a ModuleDict refuses names with dots and those of its own methods.
        self.task_modules = nn.ModuleList(modules.values())
        self.accuracies = nn.ModuleList(
            MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX) for _ in self.task_names
        )
        self._num_seen = [0] * len(self.task_names)
        self.eval()

    @classmethod
    def assemble(
        cls,
        module: LightningModule,
        head: Sequence[str],
        backbone: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
    ) -> Self:
        """Builds the module from one task's module, whose own weights stay as they are.

        Args:
            module: Any task's module; gives the structure, and the backbone tensors that ``backbone`` leaves out.
            head: Names of its head.
            backbone: Backbone tensors by name. They are used, not copied, and shared by all tasks. If some are
                sharded, so are the module's blocks in the end, and all ranks call this together.
            heads: By task, its head's tensors by name; their shapes may differ from those of ``module``.

        Returns:
            A module with one backbone in memory, without adapters.
        """
        sharded = {name: tensor for name, tensor in backbone.items() if isinstance(tensor, DTensor)}
        places = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in sharded.items()}
        plain = {**backbone, **places}
        shared = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
        replaced = {name: _as_parameter(plain.get(name, tensor), tensor) for name, tensor in shared.items()}
        copies: dict[str, LightningModule] = {}
        layers: dict[int, nn.Module] = {}
        for task, tensors in heads.items():
            copies[task] = _copy_with(module, head, replaced, tensors, layers)
            if not layers:
                layers = {id(module.get_submodule(p)): copies[task].get_submodule(p) for p in _shared(module, head)}
        for copied in copies.values():
            _without_adapters(copied)
        assembled = cls(copies)
        if sharded:
            assembled._take_up(sharded, replaced)
        return assembled

    def task_module(self, task: str) -> LightningModule:
        """The module of one task: the shared backbone with that task's head.

        Args:
            task: The task's name.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.task_names:
            raise KeyError(f"No task {task!r}; tasks: {', '.join(self.task_names)}.")
        return cast(LightningModule, self.task_modules[self.task_names.index(task)])

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

    def _measure(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if not batch_idx:
            refuse_divided(self)
        logits, target = classify(self.task_modules[dataloader_idx], batch)
        num_seen = self._num_seen[dataloader_idx] if batch_idx else 0
        self._num_seen[dataloader_idx] = num_seen + len(target)
        loader = self._loader(dataloader_idx)
        if not batch_idx and num_replicas(self.trainer) > 1 and (problem := exactness_problem(loader)):
            raise ValueError(f"Task {self.task_names[dataloader_idx]!r} has an evaluation loader that {problem}.")
        target = target.masked_fill(repeated(loader, num_seen, len(target)).to(target.device), IGNORE_INDEX)
        metric = cast(MulticlassAccuracy, self.accuracies[dataloader_idx])
        metric(logits, target)
        self.log(f"accuracy/{self.task_names[dataloader_idx]}", metric, on_epoch=True, add_dataloader_idx=False)

    def _loader(self, dataloader_idx: int) -> Any:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        return loaders[dataloader_idx] if isinstance(loaders, Sequence) else loaders

    def _take_up(self, backbone: Mapping[str, DTensor], placeholders: Mapping[str, Tensor]) -> None:
        """Shards the blocks of a backbone of placeholders, and puts each tensor in the place of its own."""
        names = {id(placeholders[name]): name for name in backbone}
        places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in backbone}
        for child in self.modules():
            for key, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in names:
                    places[names[id(parameter)]].append((child, key))
        self.shard(_mesh_of(backbone))
        for name, tensor in backbone.items():
            entire = whole(tensor)  # one at a time; the mesh may be divided in another way than it was for training
            unsharded = nn.Parameter(entire, requires_grad=False)  # one object, also where it is tied
            for child, key in places[name]:
                live = getattr(child, key)
                sharded = isinstance(live, DTensor)
                setattr(child, key, nn.Parameter(shard_like(entire, live), False) if sharded else unsharded)


def _mesh_of(backbone: Mapping[str, DTensor]) -> DeviceMesh:
    return next(iter(backbone.values())).device_mesh


def _as_parameter(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def _copy_with(
    module: LightningModule,
    head: Sequence[str],
    backbone: Mapping[str, Tensor],
    head_tensors: Mapping[str, Tensor],
    layers: Mapping[int, nn.Module],
) -> LightningModule:
    """A copy of a module in which tensors and layers are replaced by others, also of other shapes, as they are copied.

    Args:
        module: The module.
        head: Names of its head.
        backbone: Its backbone's tensors.
        head_tensors: Its head's tensors, which are copied.
        layers: Layers to use in place of its own, by the id of those.
    """
    backbone_live = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
    head_live = head_state(module, head)
    if head_live.keys() != head_tensors.keys():
        raise ValueError(f"A head has the tensors {sorted(head_tensors)}, the module's head {sorted(head_live)}.")
    # Replaced while copying, so that the backbone is never in memory twice.
    memo: dict[int, Any] = {id(live): backbone[name] for name, live in backbone_live.items()}
    memo |= {id(live): _as_parameter(head_tensors[name].clone(), live) for name, live in head_live.items()}
    return duplicate(module, memo | dict(layers))


def _shared(module: nn.Module, head: Sequence[str]) -> Iterator[str]:
    """Paths of the largest submodules that hold something of the backbone and nothing of the head."""
    backbone = {id(parameter.tensor) for parameter in backbone_parameters(module, head).values()}
    own = {id(tensor) for tensor in head_state(module, head).values()}

    def walk(parent: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in parent.named_children():
            tensors = {id(tensor) for tensor in (*child.parameters(), *child.buffers())}
            if tensors & own:
                yield from walk(child, f"{prefix}{name}.")
            elif tensors & backbone:
                yield prefix + name

    return walk(module, "")


def _without_adapters(copied: nn.Module) -> None:
    remove_adapters(copied)
    for child in copied.modules():
        if isinstance(child, nn.Linear):  # a head of another task may have another number of classes
            child.out_features = child.weight.shape[0]
