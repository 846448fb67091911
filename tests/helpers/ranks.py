"""Ranks for tests, started as if by hand."""

import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from helpers import warm

SRUN = Path(__file__).parents[2] / "examples" / "slurm" / "local" / "srun"  # a stand-in, which sets what SLURM sets


def start_ranks(work: Callable[..., object], size: int, folder: Path, *arguments: object) -> list[ForkServerProcess]:
    """Starts ranks with the variables that PyTorch reads; rank 1 prints to ``1.out`` and ``1.err`` in the folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(size):
        environment = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        prints = {name: folder / f"{rank}.{name}" for name in ("out", "err")}
        ranks.append(warm.fork(work, *arguments, environment=environment, **prints))
    return ranks


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
