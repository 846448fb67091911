"""Starting processes that merge together, and joining them.

Who starts them: ``lightning-drm merge … --devices N`` does, with the elastic launcher that torchrun is made of; or else
torchrun, srun, or a person who sets the variables that PyTorch reads. Who notices a death: the launcher, and the
processes themselves, whoever started them (`lightning_drm.distributed.watch`). Who says it: with ``--devices N`` the
launcher, otherwise a process that survived. An error in one or more processes ends all and is printed once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_drm.distributed.ranks import ALONE, ASSEMBLY, Ranks, assembling
from lightning_drm.distributed.watch import Speaker, watched

ADVICE = "What they wrote is kept: give the same command again, with any number of processes."

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RUN_ID = "lightning-drm"  # tells processes that this launcher started them


def run_processes(arguments: Sequence[str], count: int) -> None:
    """Runs Python in several processes, and waits until all of them have finished.

    They share the threads that this process would use, unless ``OMP_NUM_THREADS`` says how many each one gets.

    Args:
        arguments: What follows ``python`` on the command line.
        count: How many processes.

    Raises:
        ValueError: If a process died, naming it and the signal.
        SystemExit: If a process ended with an error, which it has printed; or if a signal ended this one.
    """
    # Imported here: a merge in one process would otherwise wait for it.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.addHandler(logging.NullHandler())
    launcher_log.propagate = False  # it reports every process that it ends; one sentence is enough
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=_RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        launch_agent(config, sys.executable, list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        who = f"Rank {rank} (process {failure.pid})"
        raise ValueError(
            f"{who} was ended by {failure.signal_name()}, so the other ranks ended too. {ADVICE}"
        ) from None
    except SignalException as error:
        sys.exit(128 + error.sigval)


@contextmanager
def started_together() -> Iterator[Ranks]:
    """Joins the processes that were started together with this one; if there are none, it works alone.

    Leaving it with an error ends the other processes too. One process raises an error, and the others exit quietly.

    Yields:
        The processes.

    Raises:
        ValueError: If the processes do not find each other, or if another one died, naming it.
    """
    if not are_several():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with assembling(rank, size):
        dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=size, timeout=ASSEMBLY)
    speaker: Speaker = "launcher" if os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID else "one"
    with watched(Ranks.of_process_group(), ADVICE, speaker=speaker) as ranks:
        yield ranks
    dist.destroy_process_group()


def are_several() -> bool:
    """Whether this process was started together with others; under srun, also sets the variables that PyTorch reads.

    Raises:
        ValueError: If such a variable is missing, or SLURM's variables contradict each other.
    """
    if "RANK" not in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        _read_slurm()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set.")
    return True


def _read_slurm() -> None:
    # Lightning knows what SLURM's variables mean, but takes longer to import than a small merge takes.
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
