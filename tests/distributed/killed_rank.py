"""Run by test_ranks: after training one rank is killed while it merges, and the other one is busy merging.

killed_rank.py FOLDER VICTIM
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback


class Killed(Average):
    """One rank gets no further than its second parameter, and the other one takes minutes over its own."""

    victim: int
    folder: Path
    num_merged = 0

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        type(self).num_merged += 1
        if self.num_merged == 2:
            if dist.get_rank() == self.victim:
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)
        return super()._merge(deltas, coefficients)


def main(folder: Path, victim: int) -> None:
    torch.set_num_threads(1)
    Killed.victim, Killed.folder = victim, folder
    merge = DRMMergeCallback(["task"], method=Killed(), dirpath=folder)
    seed_everything(0, verbose=False)
    quiet_trainer(strategy=DDPStrategy(), devices=2, max_epochs=1, callbacks=[merge]).fit(VectorTask(), Vectors(0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
