"""Run by test_eval_padding: tests two tasks under Lightning's DDP with gloo, and writes what was counted."""

import json
import sys
from pathlib import Path

import datasets
import torch
from helpers.sample_rows import BASE
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_drm.data import MultiTaskDataModule, TextTask
from lightning_drm.data.padding import IGNORE_INDEX


class Guess(LightningModule):
    """Guesses the class from a text's length, so that some guesses are right."""

    def __init__(self) -> None:
        super().__init__()
        self.num_samples = torch.nn.ModuleList(SumMetric() for _ in range(2))
        self.accuracy = torch.nn.ModuleList(
            MulticlassAccuracy(3, average="micro", ignore_index=IGNORE_INDEX) for _ in range(2)
        )

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.num_samples[dataloader_idx].update((batch["labels"] != IGNORE_INDEX).sum())
        self.accuracy[dataloader_idx].update(batch["attention_mask"].sum(1) % 3, batch["labels"])


def main(reviews: str | Path, num_processes: int) -> dict[str, dict[str, float]]:
    data = MultiTaskDataModule(
        {
            "a": TextTask(str(reviews), BASE, batch_size=2),
            "b": TextTask(str(reviews), BASE, batch_size=4, max_eval_samples=7),
        }
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
    )
    module = Guess()
    trainer.test(module, data, verbose=False)
    return {
        name: {task: metric.compute().item() for task, metric in zip(data.task_names, metrics, strict=True)}
        for name, metrics in {"num_samples": module.num_samples, "accuracy": module.accuracy}.items()
    }


if __name__ == "__main__":
    reviews, out, cache = sys.argv[1:]
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    results = main(reviews, num_processes=2)
    if rank_zero_only.rank == 0:
        Path(out).write_text(json.dumps(results))
