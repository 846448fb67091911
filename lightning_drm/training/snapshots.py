"""Snapshots: what a task's training has added to the base after some of its steps, to look at merges over training.

Each is a folder with the same files as the task's own, ``tasks/<task>/snapshots/<step>/``. It holds the weights of its
own step, also where a fit is merged by its best checkpoint.

Snapshots change nothing in a fit: weights are read, random numbers are left alone, and all ranks wait for the one that
writes. A fit that goes on from a checkpoint keeps those that it has passed, and takes the later ones again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_drm.training.chosen_weights import Weights
from lightning_drm.training.session import MergeSession


@dataclass(frozen=True)
class SnapshotPlan:
    """When snapshots are taken, and what becomes of them.

    Attributes:
        steps: After which optimizer steps.
        every_n_epochs: After every so many epochs, too.
        merge: Whether they are merged and measured once all tasks are finetuned.

    Raises:
        ValueError: If a number is not positive, or there is nothing to merge.
    """

    steps: Sequence[int] = ()
    every_n_epochs: int | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        problems = []
        if wrong := [step for step in self.steps if step < 1]:
            problems.append(f"snapshots must be numbers of optimizer steps, 1 or more, got {wrong[0]}")
        if self.every_n_epochs is not None and self.every_n_epochs < 1:
            problems.append(f"snapshot_every_n_epochs must be 1 or more, got {self.every_n_epochs}")
        if self.merge and not self:
            problems.append("merge_at_snapshots needs snapshots, at steps or every few epochs, got none")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")

    def __bool__(self) -> bool:
        return bool(self.steps) or self.every_n_epochs is not None

    def require_room(self, session: MergeSession, weights: Weights) -> None:
        """Refuses snapshots where they could not be kept, or would not be of what is merged.

        Args:
            session: Where tasks are collected.
            weights: Which weights of a fit are merged.

        Raises:
            ValueError: If there is no run folder, or averaged weights are merged.
        """
        if self and session.run_folder is None:
            raise ValueError("Snapshots are files of the run folder: give DRMMergeCallback a dirpath.")
        if self and weights == "averaged":
            raise ValueError(
                "Snapshots have the weights of their step, so they do not lead to weights 'averaged': take weights "
                "'last' or 'best', or no snapshots."
            )


class TakeSnapshots(Callback):
    """Takes the snapshots of one task's fit, and removes those that the fit leaves behind.

    Args:
        session: Knows the base and the run folder.
        task: The task that the fit belongs to.
        plan: When to take them.
        settings: Hyper-parameters of the finetune, to be stored with them.
    """

    def __init__(
        self, session: MergeSession, task: str, plan: SnapshotPlan, settings: Mapping[str, object] | None = None
    ) -> None:
        self.session = session
        self.task = task
        self.plan = plan
        self.settings = settings
        self._last_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self.plan:
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                f"{type(trainer.strategy).__name__} puts the weights together only when training ends, so no snapshots "
                "can be taken: use ModelParallelStrategy or 'ddp', or no snapshots."
            )
        if beyond := [step for step in self.plan.steps if 0 <= trainer.max_steps < step]:
            raise ValueError(
                f"Snapshots are to be taken at step {', '.join(map(str, beyond))}, but the fit of task {self.task!r} "
                f"ends after {trainer.max_steps} steps (max_steps)."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if self.session.run_folder is not None and self.session.ranks.is_first:
            self.session.run_folder.remove_snapshots(self.task, after=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.plan.steps:
            self._take(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.plan.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._take(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.plan.steps or not self.session.ranks.is_first:
            return
        assert self.session.run_folder is not None
        folder = self.session.run_folder
        if without := [step for step in self.plan.steps if not folder.has_snapshot(self.task, step)]:
            rank_zero_warn(
                f"Task {self.task!r} has no snapshot of step {', '.join(map(str, without))}: none was taken there, and "
                f"its fit ended after {trainer.global_step} steps."
            )

    def _take(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == self._last_step:  # a batch whose gradients wait for others
            return
        self._last_step = trainer.global_step
        self.session.snapshot(module, self.task, trainer.global_step, settings=self.settings)
