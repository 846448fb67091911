"""Evaluating on a part of the validation sets: always the same samples, classes in proportion."""

from collections.abc import Sequence, Sized
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
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
        count = _required_rows(name, loader, "set the number of samples to null, which uses all of them")
        if count <= self.num_samples:
            return loader
        chosen = evenly_spaced(count, self.num_samples, seed=self.seed, classes=_classes(task))
        return some_rows(loader, chosen, loader.batch_size)


def halves(
    data: MultiTaskDataModule, num_samples: int | None, *, batch_size: int, seed: int
) -> dict[str, tuple[DataLoader[Any], DataLoader[Any]]]:
    """By task, two halves of its validation samples, classes in proportion: one to learn from, and one to judge by.

    Args:
        data: The tasks, set up.
        num_samples: How many validation samples of each task take part, the same ones as in `SampledData`; all if left
            out.
        batch_size: How many samples a batch has, in both halves.
        seed: Decides which sample is in which half, and the order of those to learn from, which is another one each
            time.

    Raises:
        ValueError: If a task's samples are not numbered, or there are fewer than two.
    """
    found = {}
    for (name, task), loader in zip(data.tasks.items(), data.val_dataloader(), strict=True):
        count = _required_rows(name, loader, "give it a DataLoader whose data set has a length")
        rows, classes = np.arange(count), _classes(task)
        if num_samples is not None and num_samples < count:
            rows = evenly_spaced(count, num_samples, seed=0, classes=classes)
        if len(rows) < 2:
            raise ValueError(f"Task {name!r}: expected two validation samples or more, got {len(rows)}.")
        of_rows = None if classes is None else np.asarray(classes)[rows]
        first = rows[evenly_spaced(len(rows), len(rows) // 2, seed=seed, classes=of_rows)]
        order = torch.Generator().manual_seed(seed)
        learned_from = some_rows(loader, first, batch_size, shuffle=True, generator=order)
        found[name] = learned_from, some_rows(loader, np.setdiff1d(rows, first), batch_size)
    return found


def _required_rows(task: str, loader: Any, advice: str) -> int:
    if not has_rows(loader):
        raise ValueError(
            f"Task {task!r} has a validation loader that is no DataLoader of numbered samples, so no part of it "
            f"can be chosen: {advice}."
        )
    return num_rows(loader)


def has_rows(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether a loader's samples have numbers, so that some of them can be chosen."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def num_rows(loader: DataLoader[Any]) -> int:
    """How many samples a loader that has numbers for them has."""
    assert isinstance(loader.dataset, Sized)
    return len(loader.dataset)


def some_rows(
    loader: DataLoader[Any],
    rows: npt.NDArray[np.int64],
    batch_size: int | None,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A loader of some rows of a loader's data set.

    Args:
        loader: The loader, which makes batches of samples.
        rows: Which rows, in order.
        batch_size: How many a batch has.
        shuffle: Whether they come in another order each time.
        generator: Decides which order.
    """
    samples: Subset[Any] = Subset(loader.dataset, rows.tolist())
    return DataLoader(
        samples,
        batch_size,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        shuffle=shuffle,
        generator=generator,
    )


def _classes(task: LightningDataModule) -> npt.ArrayLike | None:
    """The class of each validation sample, where that is known."""
    return task.kind.strata(np.asarray(task.rows["validation"][LABELS][:])) if isinstance(task, DatasetTask) else None
