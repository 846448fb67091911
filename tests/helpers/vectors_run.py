"""A run of three tasks on vectors, through `MergeTrainer`, small enough to be made in a few seconds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import Vectors, VectorTask
from lightning_drm import DRM, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.merging import Method

TASKS = ["a", "b", "c"]


class ValidatedVectors(Vectors):
    """Vectors with a validation set, whose noisy labels no model gets all right."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed + 100)
        noisy = [
            TensorDataset(x, torch.where(torch.rand(len(y), generator=generator) < 0.2, 1 - y, y))
            for x, y in (self.test.tensors, (self.train.tensors[0][:40], self.train.tensors[1][:40]))
        ]
        self.test, self.validation = noisy

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=16)


class ValidatedTask(VectorTask):
    """`VectorTask`, whose fits leave the validation sets alone."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning wants one where there is a validation set."""


@dataclass(frozen=True)
class VectorsRun:
    """A run folder, and what is done in it."""

    folder: Path

    @property
    def data(self) -> MultiTaskDataModule:
        return MultiTaskDataModule({task: ValidatedVectors(seed) for seed, task in enumerate(TASKS)})

    def trainer(self, method: Method | None = None, logger: Any = False, **recipe: Any) -> MergeTrainer:
        callback = DRMMergeCallback(TASKS, method=method or DRM(), dirpath=self.folder, **recipe)
        quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        return MergeTrainer(
            callbacks=[callback], max_epochs=3, limit_val_batches=0, accelerator="cpu", logger=logger, **quiet
        )

    def fit(self, lr: float = 0.05, **options: Any) -> None:
        L.seed_everything(0)
        self.trainer().fit(ValidatedTask(lr=lr), datamodule=self.data, **options)

    def merge(self, method: Method, **recipe: Any) -> None:
        self.trainer(method, **recipe).merge(ValidatedTask(), self.data)

    def test(self, method: Method) -> None:
        self.trainer(method).test(ValidatedTask(), datamodule=self.data)

    def compare(self, *methods: Method, configured: Method | None = None, **settings: Any) -> dict[str, Any]:
        """Compares, all methods if none is named, and returns what `report.json` has of it."""
        options = {name: settings.pop(name) for name in ("split",) if name in settings}
        trainer = self.trainer(configured, **settings)
        trainer.compare(ValidatedTask(), self.data, methods=list(methods) or None, **options)
        return self.report()["methods"]

    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())
