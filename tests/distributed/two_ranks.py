"""Run by test_ranks on two processes: what is refused, and what becomes of buffers, in a file of each rank.

torchrun --nproc_per_node 2 two_ranks.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_drm import Average, DRMMergeCallback, MultiTaskModule


class Sharded(VectorTask):
    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Late(VectorTask):
    """Makes its layers when it is to shard them."""

    def __init__(self) -> None:
        super().__init__()
        del self.backbone, self.head

    def configure_model(self) -> None:
        self.backbone, self.head = nn.Linear(6, 5), nn.Linear(5, 2)


class Dropping(Vectors):
    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=5, drop_last=True)


class Normed(VectorTask):
    """Has running statistics, which each rank takes from its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(5))


def fit(module: L.LightningModule, strategy: object = "ddp") -> DRMMergeCallback:
    merge = DRMMergeCallback(["a"], method=Average())
    quiet_trainer(strategy=strategy, devices=2, max_epochs=1, callbacks=[merge]).fit(module, Vectors(0))
    return merge


CASES: dict[str, Callable[[], object]] = {
    "tensor parallel": lambda: fit(Sharded(), ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)),
    "late layers": lambda: fit(Late(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
    "other base": lambda: fit(VectorTask(seed=int(os.environ["RANK"]))),
    "dropped": lambda: quiet_trainer(strategy="ddp", devices=2).test(
        MultiTaskModule({"a": VectorTask()}), Dropping(0), verbose=False
    ),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for name, case in CASES.items():
        try:
            case()
        except ValueError as error:
            found[name] = str(error)
    normed = Normed()
    merged = fit(normed).merged_module.task_module("a")
    means = {"live": normed.backbone[-1].running_mean, "merged": merged.backbone[-1].running_mean}
    found["buffers"] = {name: tensor.tolist() for name, tensor in means.items()}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
