"""Several tasks as one data module."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_drm.names import check_task_name


class MultiTaskDataModule(LightningDataModule):
    """Named tasks, each with its own data module: finetuned one at a time, validated and tested together.

    `val_dataloader` and `test_dataloader` give one loader per task, in the order of `tasks`, so that `dataloader_idx`
    says which head to use. For finetuning take one task: `trainer.fit(module, datamodule=data.tasks["topic"])`.

    Args:
        tasks: data modules by task name. The names become folder names.

    Example::

        MultiTaskDataModule({"topic": TextTask("topics.csv", base), "mood": TextTask("moods.csv", base)})

    """

    def __init__(self, tasks: dict[str, LightningDataModule]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("Expected at least one task, got none.")
        for name, task in tasks.items():
            check_task_name(name)
            if not isinstance(task, LightningDataModule):
                raise TypeError(f"Expected a LightningDataModule for the task {name!r}, got {type(task).__name__}.")
        self.tasks = dict(tasks)
        self.save_hyperparameters({"tasks": {name: _describe(task) for name, task in tasks.items()}})

    @property
    def task_names(self) -> list[str]:
        """The names, in the order of the loaders."""
        return list(self.tasks)

    def of_tasks(self, names: Sequence[str]) -> "MultiTaskDataModule":
        """The same for some of the tasks.

        Args:
            names: their names.

        """
        return MultiTaskDataModule({name: self.tasks[name] for name in names})

    @override
    def prepare_data(self) -> None:
        self._each("prepare_data")

    @override
    def setup(self, stage: str) -> None:
        self._each("setup", stage)

    @override
    def teardown(self, stage: str) -> None:
        self._each("teardown", stage)

    @override
    def train_dataloader(self) -> NoReturn:
        raise NotImplementedError(
            f"Tasks are finetuned one at a time: pass one as datamodule, such as .tasks[{self.task_names[0]!r}]."
        )

    @override
    def val_dataloader(self) -> list[Any]:
        return self._loaders("val_dataloader")

    @override
    def test_dataloader(self) -> list[Any]:
        return self._loaders("test_dataloader")

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._batch_hook("on_before_batch_transfer", dataloader_idx, batch)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._batch_hook("transfer_batch_to_device", dataloader_idx, batch, device)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._batch_hook("on_after_batch_transfer", dataloader_idx, batch)

    def _batch_hook(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """Call a batch's hook as if its task were alone, or the model's where the task has none of its own."""
        task = self.tasks[self.task_names[dataloader_idx]]
        if is_overridden(hook, task):
            return getattr(task, hook)(*args, 0)
        assert self.trainer is not None
        return getattr(self.trainer.lightning_module, hook)(*args, dataloader_idx)

    def _loaders(self, hook: str) -> list[Any]:
        """One loader per task: a task with several would shift the `dataloader_idx` of those after it."""
        loaders = self._each(hook)
        for name, loader in zip(self.tasks, loaders, strict=True):
            if isinstance(loader, Sequence | Mapping):
                raise TypeError(
                    f"Task {name!r}: expected one loader from its {hook}, got a collection of {len(loader)}."
                )
        return loaders

    def _each(self, hook: str, *args: Any) -> list[Any]:
        """Call a hook of every task, in order, with the trainer that this module belongs to."""
        results = []
        for name, task in self.tasks.items():
            if self.trainer is not None:
                task.trainer = self.trainer
            try:
                results.append(getattr(task, hook)(*args))
            except ValueError as error:
                raise ValueError(f"Task {name!r}: {error}") from error
        return results


def _describe(task: LightningDataModule) -> dict[str, Any]:
    """How a task was made, for the run's records: data modules themselves do not belong in a checkpoint."""
    return {"class_path": f"{type(task).__module__}.{type(task).__qualname__}", "init_args": dict(task.hparams)}
