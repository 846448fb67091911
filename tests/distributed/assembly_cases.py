"""Run by test_assembly in processes of their own: ranks that never come, and ranks that come late."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_drm import Average, merge_checkpoints
from lightning_drm.distributed import launch
from lightning_drm.distributed import ranks as ranks_module
from lightning_drm.distributed.ranks import Ranks

PATIENCE = 4.0  # seconds to assemble, instead of 10 minutes
LATE = 6.0  # seconds that a rank comes late to a meeting
AWAY = 600.0  # seconds for which a rank does nothing at all, if it is not killed


def be_impatient() -> None:
    launch.ASSEMBLY = ranks_module.ASSEMBLY = timedelta(seconds=PATIENCE)


def never_start() -> None:
    """The last rank runs, but asks nobody to meet."""
    be_impatient()
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(AWAY)
        return
    with saying_how_long(), launch.started_together():
        pass


def never_meet(deed: str) -> None:
    """The last rank trains with the others, whose store waits half an hour, and then has no meetings with them."""
    be_impatient()
    dist.init_process_group("gloo")
    if dist.get_rank() == dist.get_world_size() - 1:
        if deed == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(AWAY)
        os._exit(0)
    with saying_how_long():
        Ranks.of_process_group()


@contextmanager
def saying_how_long() -> Iterator[None]:
    """Prints for how many seconds it lasted, and the error with which it ended."""
    start, failed = time.monotonic(), None
    try:
        yield
    except ValueError as error:
        failed = error
    print(time.monotonic() - start, flush=True)
    if failed is not None:
        print(f"lightning-drm: {failed}", file=sys.stderr, flush=True)
        os._exit(2)  # the other ranks' connections are not waited for


class SlowAverage(Average):
    """Rank 1 takes its time for its first parameter."""

    has_slept = False

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        if dist.get_rank() == 1 and not self.has_slept:
            type(self).has_slept = True
            time.sleep(LATE)
        return super()._merge(deltas, coefficients)


def merge_late(arguments: dict[str, Any]) -> None:
    be_impatient()
    with launch.started_together() as ranks:
        if ranks.rank == 1:
            time.sleep(LATE)
        merge_checkpoints(**arguments, method=SlowAverage(), ranks=ranks)
    print("merged" if SlowAverage.has_slept else "merged at once")
