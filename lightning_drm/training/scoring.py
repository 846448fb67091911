"""Measuring what a run makes: the base, each task's finetune, and the merged model, on the tasks' test sets.

Every measurement has a Trainer of its own, so that no other Trainer's state is touched.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_drm.data import MultiTaskDataModule
from lightning_drm.deltas import backbone_parameters, head_state, load_tensors, quantized_layers
from lightning_drm.deltas.adapters import read_factors
from lightning_drm.evaluation import Score, Split, linear_probe, measure
from lightning_drm.kinds import metrics_of
from lightning_drm.modules import (
    MultiTaskModule,
    data_parallel,
    described,
    duplicate,
    head_names_of,
    without_weights,
)
from lightning_drm.storage import write_tensors
from lightning_drm.training.merged_folder import read_merged, read_statistics
from lightning_drm.training.run_folder import BATCH_NORM, RunFolder
from lightning_drm.training.session import MergeSession
from lightning_drm.training.settings import flatten
from lightning_drm.training.strategies import is_sharded_strategy
from lightning_drm.training.task_modules import TaskModules
from lightning_drm.training.test_sets import fingerprint_of_samples
from lightning_drm.training.training_batches import TrainingBatches, is_one_loader


class Scoring:
    """Scores of the models of one run.

    Args:
        session: What was collected.
        folder: Where heads are stored.
        modules: Makes the tasks' modules.
        data: The tasks' data.
        arguments: Arguments of the Trainer that trains; those about hardware hold for measuring too.
        strategy: Its strategy, as it is now.
        progress_bar: Makes the callbacks that show progress under a label.
    """

    def __init__(
        self,
        session: MergeSession,
        folder: RunFolder,
        modules: TaskModules,
        data: MultiTaskDataModule,
        arguments: Mapping[str, Any],
        strategy: Strategy,
        progress_bar: Callable[[str], list[Callback]],
    ) -> None:
        self._session = session
        self._folder = folder
        self._modules = modules
        self._data = data
        self._arguments = arguments
        self._strategy = strategy
        self._progress_bar = progress_bar

    def check(self, task: str, module: LightningModule) -> None:
        """Refuses a task that cannot be measured, before it is trained, by measuring two batches of its test set.

        Not under strategies that shard: they would take the module over for good.

        Args:
            task: The task's name.
            module: Its untrained module, which stays as it is.

        Raises:
            ValueError: If the task cannot be measured.
        """
        if is_sharded_strategy(self._strategy):
            return
        arguments = {**self._arguments, "limit_test_batches": 2, "strategy": copy.deepcopy(self._arguments["strategy"])}
        with isolate_rng():
            # A copy around the same weights: its metrics and lists must not take one batch more into the scores.
            own = duplicate(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
            measure(MultiTaskModule({task: own}), self._data.tasks[task], arguments, [], intervals=False)

    def finetuned(self, task: str, trained: LightningModule | None = None) -> Score:
        """Score of a task's own finetune.

        Args:
            task: The task's name.
            trained: Its module just after training; rebuilt from the stored deltas if left out, and where FSDP1 has
                taken the module over for good.
        """
        if trained is None or isinstance(self._strategy, FSDPStrategy):
            module = self._session.finetuned(self._modules.fresh(task), task)
        else:
            module = MultiTaskModule({task: trained})
        return self.measure(module, self._data.tasks[task], f"{task} · test")[task]

    def base(self, task: str, max_batches: int) -> Score | None:
        """Score of the untouched backbone with a linear head trained on it, which is stored.

        Args:
            task: The task's name.
            max_batches: Training batches that the head may see.

        Returns:
            The score; ``None`` without batches, or where the head is not one linear layer or the training data are not
            one loader. A task without a head of its own (a language model) needs no batches: there the base is
            measured as it is.
        """
        module = self._modules.fresh(task)
        head = head_names_of(module, self._session.head)
        if not head:
            return self._untouched(task, module)
        if max_batches <= 0:
            return None
        base = MultiTaskModule.assemble({task: module}, head=head)
        if isinstance(self._strategy, ModelParallelStrategy):
            base.shard(data_parallel(self._strategy.device_mesh))
        base.to(self._strategy.root_device)
        data = self._data.tasks[task]
        loader = data.train_dataloader()
        if not is_one_loader(loader):
            return None
        batches = TrainingBatches(lambda: loader, self._strategy, data, module)
        state = linear_probe(base.task_module(task), head, batches, max_batches)
        if state is None:
            return None
        if self._session.ranks.is_first:
            write_tensors(self._folder.base_head(task), state)
        for name, tensor in head_state(base.task_module(task), head).items():
            tensor.data.copy_(state[name])
        return self.measure(base, data, f"{task} · base")[task]

    def stamp(self, task: str, split: Split = "test") -> dict[str, str | None]:
        """What a finished task's scores were measured on, and by: fingerprints of test set, deltas, metrics and module.

        One process asks, and tells the others.

        Args:
            task: The task's name.
            split: Whether the test or the validation set is meant.
        """
        samples = fingerprint_of_samples(self._data.tasks[task], self._arguments, split)
        asked = metrics_of(self._data.tasks[task])
        measured = asked.describe() if asked is not None else described(self._modules.template)
        metrics = xxhash.xxh3_128(repr(measured).encode()).hexdigest()
        module = xxhash.xxh3_128(repr(flatten(self._modules.template.hparams)).encode()).hexdigest()
        deltas = self._folder.fingerprint(task)
        return {f"{split}_set": samples, "deltas": deltas, "metrics": metrics, "module": module}

    def stored_base(self, task: str) -> Score | None:
        """Score of the untouched backbone with the head that `base` stored; ``None`` if it needs one and has none."""
        module = self._modules.fresh(task)
        if not head_names_of(module, self._session.head):
            return self._untouched(task, module)
        if not self._folder.base_head(task).is_file():
            return None
        return self._untouched(task, module, load_tensors(self._folder.base_head(task), "a head"))

    def merged(self, module: MultiTaskModule) -> dict[str, Score]:
        """Score by task of a merged model.

        Args:
            module: The model.
        """
        return self.measure(module, self._data, "merged · test")

    def stored_merged(self) -> dict[str, Score]:
        """Score by task of the merged model that the run folder has.

        Raises:
            FileNotFoundError: If there is none.
        """
        tasks = self._session.tasks
        module = self._modules.fresh(tasks[0])
        head = head_names_of(module, self._session.head)
        heads = read_merged(self._folder.merged, module, head, tasks)
        factors = read_factors(self._folder.merged, module, head)
        backbone = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
        statistics = read_statistics(self._folder.merged, (self._folder.merge_record or {}).get(BATCH_NORM))
        quantized = quantized_layers(module)
        own = {task: without_weights(self._modules.fresh(task), quantized) for task in tasks}
        merged = MultiTaskModule.assemble(
            own, backbone, heads, head=self._session.head, statistics=statistics, factors=factors
        )
        return self.merged(merged)

    def _untouched(self, task: str, module: LightningModule, state: Mapping[str, Tensor] | None = None) -> Score:
        heads = {task: state} if state is not None else None
        untouched = MultiTaskModule.assemble({task: module}, heads=heads, head=self._session.head)
        return self.measure(untouched, self._data.tasks[task], f"{task} · base")[task]

    def measure(
        self,
        module: MultiTaskModule,
        data: LightningDataModule,
        label: str | None,
        *,
        split: Split = "test",
        intervals: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> dict[str, Score]:
        """Score by task of any model.

        Args:
            module: The model.
            data: The data of its tasks.
            label: What a progress bar says; none is shown if left out.
            split: Which samples.
            intervals: Whether scores get their intervals.
            callbacks: What else looks on.
        """
        # FSDP1 would take the module over for good, and the merged one is the user's.
        sharded = isinstance(self._strategy, FSDPStrategy)
        strategy = "ddp" if sharded else copy.deepcopy(self._arguments["strategy"])
        arguments, bar = {**self._arguments, "strategy": strategy}, self._progress_bar(label) if label else []
        return measure(module, data, arguments, [*bar, *callbacks], intervals=intervals, split=split)
