"""A run of two small tasks with validation sets, and studies of its merges."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import QUIET, VectorTask
from lightning_drm import DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.training.candidates import RunCandidates

TASKS = {"first": 0, "second": 1}


class Sets(LightningDataModule):
    """Vectors labelled by a random linear rule, in three sets; knows how often a Trainer asked for the test set."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(520, 6, generator=generator)
        y = (x @ torch.randn(6, 2, generator=generator)).argmax(1)
        self.sets = {"train": (x[:200], y[:200]), "validation": (x[200:360], y[200:360]), "test": (x[360:], y[360:])}
        self.num_classes = 2
        self.num_tested = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.sets["train"]), batch_size=20, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.sets["validation"]), batch_size=80)

    def test_dataloader(self) -> DataLoader:
        self.num_tested += self.trainer is not None
        return DataLoader(TensorDataset(*self.sets["test"]), batch_size=80)


@dataclass
class StudiedRun:
    """A run folder and its data."""

    folder: Path
    data: MultiTaskDataModule

    def trainer(self, **options: Any) -> MergeTrainer:
        return MergeTrainer(
            max_epochs=3, callbacks=[DRMMergeCallback(list(TASKS), dirpath=self.folder, **options)], **QUIET
        )

    def tune(self, **options: Any) -> None:
        self.trainer().tune(VectorTask(lr=0.3), self.data, **options)

    def study(self, function: Callable[[RunCandidates], Any], **options: Any) -> Any:
        """What a function finds out about the run's merges."""
        return self.trainer(**options)._study(VectorTask(lr=0.3), self.data, lambda _, found: function(found))


def make_data() -> MultiTaskDataModule:
    return MultiTaskDataModule({task: Sets(seed) for task, seed in TASKS.items()})
