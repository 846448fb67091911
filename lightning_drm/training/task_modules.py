"""Fresh modules of the tasks, made from one template: the same weights each time, and each task's own head."""

import os
from functools import partial
from typing import Any, cast

from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy

from lightning_drm.data import MultiTaskDataModule
from lightning_drm.data.task import DatasetTask
from lightning_drm.deltas.compiled import compiled_methods, is_compiled, uncompiled
from lightning_drm.kinds import metrics_of
from lightning_drm.modules import OF_DATA, duplicate, share_factories
from lightning_drm.training.session import MergeSession
from lightning_drm.training.strategies import convert_precision
from lightning_drm.training.training_batches import TrainingBatches


class TaskModules:
    """Makes a task's module whenever one is needed, so that no more than one has to be kept.

    Args:
        template: What each is a copy of, or `torch.compile` of it. Its ``configure_for(data)``, if it has one, is
            called with the task's data; or its ``configure_task(num_classes)`` with the number of classes that the data
            have.
        data: The tasks' data modules.
        session: The session, whose ranks make their modules together.
        strategy: Tells which process prepares the data, and the precision of the weights.

    Raises:
        ValueError: If copies of the template would not be compiled as it is.
    """

    def __init__(
        self, template: LightningModule, data: MultiTaskDataModule, session: MergeSession, strategy: Strategy
    ) -> None:
        self._given = template
        self._template = cast(LightningModule, uncompiled(template))
        _refuse_lost_compilation(self._template)
        self._data = data
        self._session = session
        self._strategy = strategy

    @property
    def seed(self) -> int:
        """The seed that everything of a run is drawn from."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def template(self) -> LightningModule:
        """What the modules are copies of."""
        return self._template

    def fresh(self, task: str) -> LightningModule:
        """A task's untrained module, in the precision of its training; all ranks make it together.

        Args:
            task: The task's name.

        Raises:
            ValueError: If the module asks for a number of classes, and the task's data has none.
        """
        self._seed_everything()
        module = duplicate(self._template)
        share_factories(module)
        data = self._data.tasks[task]
        if hasattr(module, "configure_for"):
            self._prepare(data)
            cast(Any, module).configure_for(data)
        elif hasattr(module, "configure_task"):
            self._prepare(data)
            if not hasattr(data, "num_classes"):
                raise ValueError(f"{type(data).__name__} has no `num_classes`, which {type(module).__name__} asks for.")
            cast(Any, module).configure_task(data.num_classes)
        if not hasattr(module, "configure_for"):
            self._give_metrics(module, data)
        convert_precision(self._strategy, module)
        return module

    def compiled(self, module: LightningModule) -> LightningModule:
        """A task's module as it is trained: compiled as the template is, if that came compiled as a whole.

        Args:
            module: What `fresh` gave.
        """
        return cast(LightningModule, cast(Any, self._given).dynamo_ctx(module)) if is_compiled(self._given) else module

    def _give_metrics(self, module: LightningModule, data: LightningDataModule) -> None:
        """Gives a user's own module the metrics that its data name, not those that a `DatasetTask` has anyway."""
        said = [name for name in ("metric", "score", "higher_is_better") if getattr(data, name, None) is not None]
        if not callable(getattr(data, "metrics", None)) or (isinstance(data, DatasetTask) and not said):
            return
        self._prepare(data)
        if (metrics := metrics_of(data)) is None:
            return
        if (score := getattr(module, "score", None)) is not None:
            raise ValueError(
                f"Both {type(module).__name__} (by its score, {score!r}) and its data (by their "
                f"{', '.join(said) or 'metrics'}) say how the task is judged: leave one out."
            )
        setattr(module, OF_DATA, metrics)

    def make_known(self) -> LightningModule:
        """Lets the session know the modules of tasks that were not trained in this process.

        Returns:
            An untrained module, which has the base's weights.
        """
        first, *others = self._session.tasks
        module = self.fresh(first)
        if not self._session.knows_module(first):
            self._session.keep_module(module, first)
        for task in others:
            if not self._session.knows_module(task):
                self._session.keep_module(self.fresh(task), task)
        return module

    def prepared(self, trainer: Trainer) -> MultiTaskDataModule:
        """The tasks' data, set up for a fit, which has training and validation sets.

        Args:
            trainer: The Trainer of data that have none.
        """
        for data in self._data.tasks.values():
            if data.trainer is None:
                data.trainer = trainer
            self._prepare(data)
        return self._data

    def training_batches(self, trainer: Trainer) -> dict[str, TrainingBatches]:
        """By task, its training batches on the Trainer's device; all ranks see the same ones.

        Args:
            trainer: The Trainer.
        """
        return {
            task: TrainingBatches(partial(self.training_loader, task, trainer), self._strategy, data, self._template)
            for task, data in self._data.tasks.items()
        }

    def training_loader(self, task: str, trainer: Trainer) -> Any:
        """A task's training loader, the same one each time and on all ranks.

        Args:
            task: The task's name.
            trainer: The Trainer, which the data know if they know no other.
        """
        data = self._data.tasks[task]
        if data.trainer is None:
            data.trainer = trainer
        self._seed_everything()
        self._prepare(data)
        return data.train_dataloader()

    def _seed_everything(self) -> None:
        seed_everything(self.seed, workers=bool(int(os.environ.get("PL_SEED_WORKERS", 0))), verbose=False)

    def _prepare(self, data: LightningDataModule) -> None:
        ranks = self._session.ranks
        local_rank = getattr(self._strategy, "local_rank", 0)
        if local_rank == 0 if data.prepare_data_per_node else ranks.is_first:
            data.prepare_data()
        ranks.wait()
        data.setup("fit")


def _refuse_lost_compilation(template: LightningModule) -> None:
    """Refuses a template with parts that are compiled in a way that no copy can have."""
    parts = dict(template.named_modules())
    lost = [name or "itself" for name, child in parts.items() if child._compiled_call_impl is not None]
    if template._compiler_ctx is None:  # else the methods are Lightning's, which compiles those of each task's module
        lost += [f"{name}.{own}".lstrip(".") for name, child in parts.items() for own in compiled_methods(child)]
    if lost:
        raise ValueError(
            f"{type(template).__name__} has compiled {', '.join(lost)} in place, which is lost in the copies that "
            "tasks train: compile in configure_model, put torch.compile(…) around a submodule, or pass "
            "torch.compile(module)."
        )
