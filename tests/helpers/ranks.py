"""Ranks for tests: real processes that share one import of everything, started as if by hand.

A server process imports the package once, and forks a process whenever a test asks for one. So a rank starts in a
moment, and may be killed like any other process.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SRUN = Path(__file__).parents[2] / "examples" / "slurm" / "local" / "srun"  # a stand-in, which sets what SLURM sets
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "helpers.models", "lightning_drm.merging", "lightning_drm.cli.checkpoints"])


def start_ranks(work: Callable[..., object], size: int, folder: Path, *arguments: object) -> list[ForkServerProcess]:
    """Starts ranks with the variables that PyTorch reads; rank 1 prints to ``1.out`` and ``1.err`` in the folder."""
    _import_everything()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(size):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(CONTEXT.Process(target=_run, args=(own, folder / str(rank), work, *arguments), daemon=True))
        ranks[-1].start()
    return ranks


@cache
def _import_everything() -> None:
    """Starts the server, so that no test has to be patient with it."""
    first = CONTEXT.Process(target=int)
    first.start()
    first.join()


def _run(variables: dict[str, str], prints: Path, work: Callable[..., object], *arguments: object) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    os.environ.update(variables)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(prints.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream.fileno())
    work(*arguments)


def end_codes(ranks: list[ForkServerProcess], patience: float) -> list[int | None]:
    """How the ranks ended: their exit codes, minus the signal for one that was killed, ``None`` if one still runs."""
    for rank in ranks:
        rank.join(patience)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes


def slurm_job(size: int) -> dict[str, str]:
    """The variables of a SLURM job on this machine."""
    job = {"JOB_ID": str(os.getpid()), "JOB_NAME": "merge", "NODELIST": "localhost", "NODEID": "0"}
    return {
        f"SLURM_{name}": value for name, value in {**job, "NTASKS": str(size), "NTASKS_PER_NODE": str(size)}.items()
    }
