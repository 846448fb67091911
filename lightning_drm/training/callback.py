"""The callback that turns a series of single-task fits into one merged model: hooks around a `MergeSession`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_drm.deltas import TaskVector
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.evaluation import Published
from lightning_drm.fusion import Override, Recipe
from lightning_drm.merging import DRM, Method, Need
from lightning_drm.modules import MultiTaskModule, batch_norms
from lightning_drm.training.chosen_weights import Weights, callbacks_of, require_choice, settings_of
from lightning_drm.training.collect import CollectTask, join_processes
from lightning_drm.training.delta_cache import Store
from lightning_drm.training.foreign import problem_of_class
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.session import MergeSession
from lightning_drm.training.snapshots import SnapshotPlan, TakeSnapshots
from lightning_drm.training.statistics import StatisticsPlan
from lightning_drm.training.strategies import is_sharded_strategy, whole_weights
from lightning_drm.training.training_batches import TrainingBatches, is_one_loader


class DRMMergeCallback(Callback):
    """Collects each task's weight deltas when its fit ends, and fuses them when the last one has come.

    One callback object serves one fit per task, each with a fresh Trainer. Which task a fit belongs to is said by the
    module's ``task_name``, or by `for_task` before the fit. With a ``dirpath``, tasks that other processes have left
    there count as arrived; a task that is fitted again replaces its earlier finetune.

    Fits may run on one device, under ``ddp``, or sharded under ``FSDPStrategy`` (FSDP1) or ``ModelParallelStrategy``
    (FSDP2). Under FSDP1 each rank has all weights for as long as a task is collected and merged, and the merged model
    is not sharded. Parameters are shared out over the ranks by what they cost to merge; deltas that wait on a device or
    in host memory wait with their owner.

    Args:
        tasks: The tasks' names, in the order of the test dataloaders.
        method: How deltas are merged.
        dirpath: Run folder, where deltas, heads and the merged model are written. Nothing is written without it.
        coefficients: Coefficient by task; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` merges convolution weights as ``(out, in·k·k)`` matrices, ``"average"`` does not.
        non_matrix: What a matrix method does to all other parameters: the weighted ``"average"`` of all tasks, or of
            those that ``"elect"`` the same sign.
        overrides: Exceptions by name; the first that matches a parameter counts.
        store: Where deltas wait for the other tasks: on the ``device``, in host memory (``cpu``), or on ``disk``.
            ``auto`` takes the disk if there is a run folder, else the device while it has room, else host memory.
        head: Names of the submodules or parameters that are a task's head; the module's own ``head_names`` if left out.
        weights: Which weights of a fit are merged, buffers and head included: the ``last`` step's, those of the
            ``best`` checkpoint (of a ``ModelCheckpoint`` with a ``monitor``), or the ``averaged`` ones of Lightning's
            ``WeightAveraging`` or ``EMAWeightAveraging``. A fit that lacks such a callback is refused before it begins.
        batch_norm_batches: How many training batches of each task (of each process) estimate the running statistics of
            the merged model's batch norms again, for each task its own; 0 leaves them merged like all other buffers.
            It costs nothing where there are none, or where training has kept their statistics fixed.
        snapshots: Keep each task's deltas and head as they are after these optimizer steps, too, for looking at merges
            over training: ``[25, 50, 100]``. They change nothing in the fits; not under FSDP1.
        snapshot_every_n_epochs: The same after every so many epochs.
        merge_at_snapshots: When all tasks are finetuned, merge the snapshots of each step that all of them have, and
            log ``merge/snapshot/<task>`` and ``merge/snapshot/average``, measured on the validation sets, at that step.
            Only with `MergeTrainer`, on one device, as it knows the data of all tasks.
        statistics: Statistics of the training data to collect when a fit ends: ``gram`` (the inputs of linear layers
            and experts, for RegMean and WUDI), ``fisher`` (for Fisher). What the method needs is collected anyway.
        statistics_samples: From how many training samples of each task; the method's own ``num_samples``, or 256, if
            left out.
        count_padding: Whether the positions of padding count in Gram matrices, as in RegMean's published code.
        published: A model of the paper's tables, such as ``ViT-B/32``: `compare` and `analyze` show what was published
            about it beside what they measure.

    Raises:
        ValueError: If names repeat or cannot be folder names, coefficients are given for unknown tasks,
            ``store="disk"`` has no ``dirpath``, ``batch_norm_batches`` is negative, there is no such choice of
            ``weights``, snapshots cannot be taken so, there are no such statistics, or nothing was published about
            the model.

    Example:
        >>> merge = DRMMergeCallback(["topic", "valence"], method=DRM(density=0.2))
        >>> merge.missing
        ['topic', 'valence']
    """

    def __init__(
        self,
        tasks: Sequence[str],
        method: Method = DRM(),
        dirpath: str | os.PathLike[str] | None = None,
        *,
        coefficients: Mapping[str, float] | None = None,
        convolutions: Literal["average", "matrix"] = "average",
        non_matrix: Literal["average", "elect"] = "average",
        overrides: Sequence[Override] = (),
        store: Store = "auto",
        head: Sequence[str] | None = None,
        weights: Weights = "last",
        batch_norm_batches: int = 100,
        snapshots: Sequence[int] = (),
        snapshot_every_n_epochs: int | None = None,
        merge_at_snapshots: bool = False,
        statistics: Sequence[Need] = (),
        statistics_samples: int | None = None,
        count_padding: bool = False,
        published: str | None = None,
    ) -> None:
        require_choice(weights)
        self.statistics = StatisticsPlan(tuple(statistics), statistics_samples, count_padding)
        self.statistics.of(method)
        self.weights = weights
        self.published = Published(published) if published is not None else None
        self.snapshots = SnapshotPlan(tuple(snapshots), snapshot_every_n_epochs, merge_at_snapshots)
        self.session = MergeSession(
            tasks,
            method,
            dirpath,
            head=head,
            coefficients=coefficients,
            convolutions=convolutions,
            non_matrix=non_matrix,
            overrides=overrides,
            store=store,
            batch_norm_batches=batch_norm_batches,
        )
        self.snapshots.require_room(self.session, weights)
        self._batches: dict[str, TrainingBatches] = {}
        self._announced: str | None = None
        self._fit: CollectTask | None = None
        self._taking: TakeSnapshots | None = None

    def for_task(self, task: str) -> Self:
        """Says which task the next fit belongs to: ``Trainer(callbacks=[merge.for_task("topic")])``.

        Args:
            task: The task's name.

        Returns:
            The callback.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"There is no task {task!r}; tasks: {', '.join(self.tasks)}.")
        self._announced = task
        return self

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return self.session.tasks

    @property
    def recipe(self) -> Recipe:
        """The method, the coefficients, and what they apply to."""
        return self.session.recipe

    @property
    def run_folder(self) -> RunFolder | None:
        """Where everything is stored, if it is."""
        return self.session.run_folder

    @property
    def store(self) -> Store:
        """Where deltas wait for the other tasks."""
        return self.session.store

    @property
    def batch_norm_batches(self) -> int:
        """How many batches of a task estimate the statistics of batch norms again."""
        return self.session.batch_norm_batches

    @property
    def head(self) -> Sequence[str] | None:
        """Names of a task's head, where they were given."""
        return self.session.head

    @property
    def missing(self) -> list[str]:
        """The tasks that have not arrived yet."""
        return self.session.missing

    @property
    def task_vectors(self) -> dict[str, TaskVector]:
        """The task vectors that have arrived; see `MergeSession.task_vectors`."""
        return self.session.task_vectors

    @property
    def is_merged(self) -> bool:
        """Whether the merged model is there."""
        return self.session.is_merged

    @property
    def merged_module(self) -> MultiTaskModule:
        """The merged model with every task's head, for ``trainer.test(merge.merged_module, …)``.

        Raises:
            RuntimeError: If tasks are still missing.
        """
        return self.session.merged

    def join(self, world_size: int) -> Ranks:
        """Lets all ranks of the default process group collect and merge together; see `MergeSession.join`."""
        return self.session.join(world_size)

    def restore(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Takes up task vectors that the run folder already has; see `MergeSession.restore`."""
        return self.session.restore(tasks)

    def fuse(self, module: LightningModule | None = None, *, device: torch.device | None = None) -> MultiTaskModule:
        """Merges all task vectors, which also happens by itself when the last task has arrived.

        See `MergeSession.fuse`, which takes another method too. Batch norms are estimated on the training data of the
        tasks that were fitted here.
        """
        with isolate_rng():  # other fits may go on
            return self.session.fuse(module=module, device=device, batch_norm=self._batches)

    def finetuned_module(self, module: LightningModule, task: str) -> MultiTaskModule:
        """Rebuilds one task's finetuned model from its task vector; see `MergeSession.finetuned`."""
        return self.session.finetuned(module, task)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for given in (trainer, pl_module):
            if problem := problem_of_class(type(given)):
                raise ValueError(problem)
        announced, self._announced = self._announced, None
        join_processes(self.session, trainer)
        if self.run_folder is not None and (found := self.session.restore()):
            rank_zero_info(f"{self.run_folder.path} already has {', '.join(found)}.")
        task = self._task_of(pl_module, announced)
        self._refuse_other_weights(task)
        if self.snapshots.merge:
            raise ValueError(
                "merge_at_snapshots measures on the validation sets of all tasks, which MergeTrainer alone knows: fit "
                "with it, or leave merge_at_snapshots out."
            )
        settings = settings_of(self.weights, callbacks_of(trainer))
        self._fit = CollectTask(self.session, task, settings, self.weights, self.statistics)
        self._fit.setup(trainer, pl_module, stage)
        self._taking = TakeSnapshots(self.session, task, self.snapshots, settings)
        self._taking.setup(trainer, pl_module, stage)
        if self.statistics.of(self.recipe.method)[0] and is_sharded_strategy(trainer.strategy):
            raise ValueError(
                f"Statistics are taken with whole weights, and {type(trainer.strategy).__name__} shards them. "
                "MergeTrainer takes them after each fit; MergeSession.collect_statistics takes any whole module."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._fit is not None, "setup comes before"
        self._fit.note_start(trainer, pl_module, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._taking is not None, "setup comes before"
        self._taking.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._taking is not None, "setup comes before"
        self._taking.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._taking is not None, "setup comes before"
        self._taking.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._fit is not None, "setup comes before"
        assert self._taking is not None, "setup comes before"
        self._taking.on_train_end(trainer, pl_module)
        with whole_weights(trainer.strategy):
            self._fit.collect(trainer, pl_module)
            self._keep_batches(self._fit.task, trainer, pl_module)
            if not self.missing:
                self.fuse()
        self._fit = self._taking = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is None:  # collected when its training ended
            return
        self._fit.on_fit_end(trainer, pl_module)
        self._keep_batches(self._fit.task, trainer, pl_module)
        if not self.missing:
            self.fuse()
        self._fit = self._taking = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fit = self._taking = None

    def _keep_batches(self, task: str, trainer: Trainer, module: LightningModule) -> None:
        """Keeps hold of a task's training data where the merged model will need them: its fit has them, nobody else."""
        loader = trainer.train_dataloader
        if self.batch_norm_batches and batch_norms(module) and is_one_loader(loader):
            data = getattr(trainer, "datamodule", None)
            self._batches[task] = TrainingBatches(lambda: loader, trainer.strategy, data, module)

    def _refuse_other_weights(self, task: str) -> None:
        """Refuses to merge a fit with restored ones of which other weights were taken."""
        stored = {other: str(vector.settings.get("weights", "last")) for other, vector in self.task_vectors.items()}
        if mixed := {other: taken for other, taken in stored.items() if taken != self.weights and other != task}:
            listed = ", ".join(f"{other} ({taken!r})" for other, taken in mixed.items())
            raise ValueError(
                f"Task {task!r} is to be merged with weights {self.weights!r}, but others were collected with other "
                f"weights: {listed}; fit them again, or choose another dirpath."
            )

    def _task_of(self, module: LightningModule, announced: str | None) -> str:
        """The task that a fit belongs to."""
        named = getattr(module, "task_name", None)
        if named is not None and announced is not None and named != announced:
            raise ValueError(
                f"The fit was announced as task {announced!r}, but the module's task_name is {named!r}: which is it?"
            )
        task = named if named is not None else announced
        if task is None and len(self.missing) == 1:
            return self.missing[0]
        if task is None:
            state = f"{', '.join(self.missing)} are missing" if self.missing else "all of them have arrived"
            raise ValueError(
                f"Which of the tasks {', '.join(self.tasks)} does this fit belong to ({state})? Give the module a "
                "task_name, or say it to the callback: Trainer(callbacks=[merge.for_task('NAME')])."
            )
        if task not in self.tasks:
            raise ValueError(
                f"The module's task_name is {task!r}, which is not one of the tasks {', '.join(self.tasks)}."
            )
        return str(task)
