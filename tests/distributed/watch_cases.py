"""Run by test_watch in processes of their own: what ranks do under a watch, and what becomes of them."""

import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from lightning_drm.distributed import watch
from lightning_drm.distributed.ranks import Ranks

GRACE = 1.0  # instead of 10 seconds
LONG = 4  # seconds, longer than everything that the watch waits for
ADVICE = "Try again."


def die(ranks: Ranks) -> None:
    time.sleep(0.5)  # until the others are at work
    os.kill(os.getpid(), signal.SIGKILL)


def fail(ranks: Ranks) -> None:
    time.sleep(0.5)
    raise ValueError(f"NaN on rank {ranks.rank}.")


def stop(ranks: Ranks) -> None:
    """As a handler of SIGTERM does."""
    time.sleep(0.5)
    sys.exit(143)


def compute(ranks: Ranks) -> None:
    """For hours, in C, where no signal interrupts it."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


DEEDS: dict[str, Callable[[Ranks], object]] = {
    "dies": die,
    "fails": fail,
    "is stopped": stop,
    "computes": compute,
    "is done": lambda _: None,
    "meets": lambda ranks: ranks.wait(),
    "sleeps": lambda _: time.sleep(600),
    # Unlike CDLL, PyDLL keeps the interpreter's lock, as some of LAPACK's wrappers do.
    "holds the lock": lambda ranks: (ctypes.PyDLL(None).sleep(LONG), ranks.wait()),
}


def work_together(deeds: list[str], speaker: watch.Speaker) -> None:
    watch.GRACE, watch._NEWS = GRACE, 0.3
    dist.init_process_group("gloo")
    ranks = Ranks.of_process_group()
    try:
        with watch.watched(ranks, ADVICE, speaker=speaker):
            DEEDS[deeds[ranks.rank]](ranks)
    except ValueError as error:
        print(f"lightning-drm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def work_again() -> None:
    """Rank 1 fails and goes on, and rank 0 is interrupted and goes on: they can work together again."""
    dist.init_process_group("gloo")
    ranks = Ranks.of_process_group()
    for attempt in range(2):
        try:
            with watch.watched(ranks, ADVICE):
                if ranks.rank == 1 and attempt == 0:
                    raise KeyError("mine")
                time.sleep(0 if attempt else 600)
            print("done")
        except (ValueError, KeyError) as error:
            print(f"{type(error).__name__}: {error}")
