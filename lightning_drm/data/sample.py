"""Evaluating on a part of the validation sets: always the same samples, classes in proportion."""

from collections.abc import Sequence, Sized
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from lightning import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset, Subset
from typing_extensions import override

from lightning_drm.data.multitask import MultiTaskDataModule
from lightning_drm.data.splits import evenly_spaced
from lightning_drm.data.task import DatasetTask
from lightning_drm.kinds import LABELS


def require_validation_sets(data: MultiTaskDataModule) -> None:
    """Refuses tasks without a validation set.

    Args:
        data: The tasks.

    Raises:
        ValueError: Naming them.
    """
    if without := [name for name, task in data.tasks.items() if not is_overridden("val_dataloader", task)]:
        raise ValueError(
            f"{', '.join(without)}: the data have no val_dataloader, and merges are chosen on validation sets, so that "
            "test sets stay unseen."
        )


class SampledData(MultiTaskDataModule):
    """Tasks of which at most a number of validation samples are used, the same ones each time.

    Args:
        tasks: Data modules by task name.
        num_samples: How many samples of each task.
        seed: Decides which.
    """

    def __init__(self, tasks: dict[str, LightningDataModule], num_samples: int, seed: int = 0) -> None:
        super().__init__(tasks)
        if num_samples < 1:
            raise ValueError(f"Expected at least one sample for each task, got {num_samples}.")
        self.num_samples = num_samples
        self.seed = seed

    @override
    def of_tasks(self, names: Sequence[str]) -> Self:
        return type(self)({name: self.tasks[name] for name in names}, self.num_samples, self.seed)

    @override
    def val_dataloader(self) -> list[Any]:
        loaders = zip(self.tasks.items(), super().val_dataloader(), strict=True)
        return [self._sampled(name, task, loader) for (name, task), loader in loaders]

    def _sampled(self, name: str, task: LightningDataModule, loader: Any) -> Any:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"Task {name!r} has a validation loader that is no DataLoader of numbered samples, so no part of it "
                "can be chosen: set the number of samples to null, which uses all of them."
            )
        assert isinstance(loader.dataset, Sized)
        if len(loader.dataset) <= self.num_samples:
            return loader
        chosen = evenly_spaced(len(loader.dataset), self.num_samples, seed=self.seed, classes=_classes(task))
        return DataLoader(
            Subset(loader.dataset, chosen.tolist()),
            loader.batch_size,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )


def _classes(task: LightningDataModule) -> npt.ArrayLike | None:
    """The class of each validation sample, where that is known."""
    return task.kind.strata(np.asarray(task.rows["validation"][LABELS][:])) if isinstance(task, DatasetTask) else None
