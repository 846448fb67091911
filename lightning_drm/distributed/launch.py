"""Processes that were started together, for a merge: by torchrun, by srun, by Lightning's launcher, or by hand.

They find each other through a key-value store, and watch each other there: when one ends before the others, all end,
and one of them says why, once.

Lightning knows how to start processes and what SLURM's variables mean; it is imported where it is asked, since most
merges are of one process and would wait longer for the import than for the merge.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.distributed.watch import watched

_ASSEMBLY = timedelta(minutes=10)  # for all processes to start
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes(count: int) -> None:
    """Starts this command again with Lightning's launcher, so that with this process there are as many as asked for.

    Args:
        count: How many.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

    _set_num_threads_if_needed(count)  # before they start: all are to have the same number
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=count, num_nodes=1)
    launcher.launch(lambda: None)


@contextmanager
def started_together() -> Iterator[Ranks]:
    """Joins the processes that were started with this one; where there are none, it is alone.

    Leaving it with an error ends the other processes too, and one of them all raises an error; the rest exit quietly.

    Yields:
        The processes.

    Raises:
        ValueError: If another process was killed, naming it.
    """
    if not are_several():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=size, timeout=_ASSEMBLY)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"Rank {rank} of {size} found not all others at {where}: {_first_line(error)}") from error
    advice = "What they wrote is kept: give the same command again, with any number of processes."
    with watched(Ranks.of_process_group(), advice, one_speaks=True) as ranks:
        yield ranks
    dist.destroy_process_group()


def are_several() -> bool:
    """Whether processes were started together with this one; completes their environment by what PyTorch wants.

    Raises:
        ValueError: If they were started in a way that cannot work.
    """
    if "RANK" not in os.environ and "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:  # Lightning's launcher
        os.environ["RANK"] = os.environ["LOCAL_RANK"]
    elif "RANK" not in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        _read_slurm()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set.")
    return True


def _read_slurm() -> None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive job, whose commands are not started by srun
        return
    try:
        slurm = SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(slurm.global_rank()), str(slurm.world_size())
    os.environ["LOCAL_RANK"] = str(slurm.local_rank())
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
