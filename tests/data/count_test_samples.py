"""Run by test_sharing: tests two tasks under Lightning's DDP with gloo, and writes what was counted."""

import json
import sys
from pathlib import Path

import datasets
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from helpers.sample_rows import BASE
from lightning_drm.data import MultiTaskDataModule, TextTask
from lightning_drm.modules import MultiTaskModule


class Guess(LightningModule):
    """Guesses the class from a text's length, so that some guesses are right."""

    score = "f1"

    def __init__(self) -> None:
        super().__init__()
        self.samples = SumMetric()
        self.f1 = MulticlassF1Score(3, average="macro")
        self.at_the_end = MulticlassAccuracy(3, average="micro")

    def test_step(self, batch, batch_idx):
        guesses = batch["attention_mask"].sum(1) % 3
        self.samples(len(batch["labels"]))
        self.log("samples", self.samples)
        self.f1.update(guesses, batch["labels"])
        self.log("test_f1", self.f1)
        self.at_the_end.update(guesses, batch["labels"])
        self.log("test/right", (guesses == batch["labels"]).float().mean())

    def on_test_epoch_end(self):
        self.log("accuracy", float(self.at_the_end.compute()))
        self.at_the_end.reset()


def main(reviews: str | Path, num_processes: int) -> dict[str, float]:
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
    torch.manual_seed(0)
    trainer.test(MultiTaskModule({"a": Guess(), "b": Guess()}), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    reviews, out, cache, num_processes = sys.argv[1:]
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    results = main(reviews, num_processes=int(num_processes))
    if rank_zero_only.rank == 0:
        Path(out).write_text(json.dumps(results))
