"""Run by test_ranks: a merge in which ranks come late to every meeting, later than the training's time-out.

torchrun --nproc_per_node 2 slow_rank.py FOLDER
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_drm import Average, DRMMergeCallback
from lightning_drm.deltas import TaskVector
from lightning_drm.training.run_folder import RunFolder

TIMEOUT, LATE = 5, 7  # seconds


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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    merge = DRMMergeCallback(["task"], method=SlowAverage(), dirpath=folder)
    merge.run_folder = SlowFolder(folder)
    seed_everything(0, verbose=False)
    strategy = DDPStrategy(timeout=timedelta(seconds=TIMEOUT))
    quiet_trainer(strategy=strategy, devices=2, max_epochs=1, callbacks=[merge]).fit(VectorTask(), Vectors(0))
    assert merge.is_merged
    try:  # that nothing timed out above shows something only if this does
        if dist.get_rank() == 1:
            time.sleep(LATE)
        dist.barrier()
    except RuntimeError as error:
        print(f"rank {dist.get_rank()}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
