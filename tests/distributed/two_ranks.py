"""Run by test_ranks on two processes: what is refused, what becomes of buffers, and ranks that are late.

What each rank found is in a file of its own.

torchrun --nproc_per_node 2 two_ranks.py FOLDER
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback, MultiTaskModule
from lightning_drm.deltas import TaskVector
from lightning_drm.deltas.hashed_file import HashedFile
from lightning_drm.deltas.statistics import STATISTICS_FILE
from lightning_drm.training.run_folder import RunFolder

TIMEOUT, LATE = 3, 4  # seconds


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


class SlowAverage(Average):
    """Rank 1 takes its time for its first parameter."""

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        if dist.get_rank() == 1 and not hasattr(type(self), "has_slept"):
            type(self).has_slept = True
            time.sleep(LATE)
        return super()._merge(deltas, coefficients)


class SlowFolder(RunFolder):
    """Writing a task vector takes rank 0 a while."""

    def save_task_vector(self, vector: TaskVector) -> None:
        time.sleep(LATE)
        super().save_task_vector(vector)


class Impatient(L.Callback):
    """From the end of training on, the training's process group waits for nobody."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))


def come_late(folder: Path) -> str:
    """Ranks come to every meeting of a merge later than the training's time-out allows.

    Returns:
        What the training's process group says when a rank comes as late to it, without which the case shows nothing.
    """
    merge = DRMMergeCallback(["task"], method=SlowAverage(), dirpath=folder)
    merge.session.run_folder = SlowFolder(folder)
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(strategy="ddp", devices=2, max_epochs=1, callbacks=[Impatient(), merge])
    trainer.fit(VectorTask(), Vectors(0))
    try:
        if dist.get_rank() == 1:
            time.sleep(LATE)
        dist.barrier()
    except RuntimeError as error:
        return str(error)
    return ""


def fit(module: L.LightningModule, strategy: object = "ddp") -> DRMMergeCallback:
    merge = DRMMergeCallback(["a"], method=Average(), batch_norm_batches=0)
    quiet_trainer(strategy=strategy, devices=2, max_epochs=1, callbacks=[merge]).fit(module, Vectors(0))
    return merge


def replace_what_is_read(folder: Path) -> dict[str, int]:
    """Collects statistics twice, while rank 1 takes its time to read the first ones.

    Returns:
        How many tensors this rank read, and how many of them from a file that was replaced meanwhile.
    """
    read, found = HashedFile.read, {"read": 0, "replaced": 0}

    def read_slowly(file: HashedFile, name: str) -> Tensor:
        before = file.path.stat().st_ino
        tensor = read(file, name)
        time.sleep(0.2 * dist.get_rank())
        if file.path.name == STATISTICS_FILE:
            found["read"] += 1
            found["replaced"] += file.path.stat().st_ino != before
        return tensor

    merge = DRMMergeCallback(["a"], Average(), folder, statistics=["gram", "fisher"], batch_norm_batches=0)
    with mock.patch.object(HashedFile, "read", read_slowly):
        quiet_trainer(strategy="ddp", devices=2, max_epochs=1, callbacks=[merge]).fit(VectorTask(), Vectors(0))
    return found


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
    folder = Path(sys.argv[1])
    found["folder"] = str(folder)
    found["statistics"] = replace_what_is_read(folder / "statistics")
    found["too late"] = come_late(folder / "late")  # the last case, as it breaks the process group
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
