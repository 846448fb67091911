"""Processes that were started together, for a merge: by torchrun, by srun, by Lightning's launcher, or by hand.

They find each other through a key-value store. There each also has a pulse, and listens for the next one's: a process
that was killed can tell nobody, and one that computes for minutes would not ask. When one ends before the others, all
end: one of them says why, once.

Lightning knows how to start processes and what SLURM's variables mean; it is imported where it is asked, since most
merges are of one process and would wait longer for the import than for the merge.
"""

from __future__ import annotations

import _thread
import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.rendezvous import rendezvous

from lightning_drm.ranks import ALONE, Ranks

PULSE = 2.0  # seconds between two beats
SILENCE = 20.0  # seconds without a beat after which a process counts as dead
GRACE = 10.0  # seconds that a process gets to end by itself, which a long computation does not let it

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
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_ASSEMBLY))
        watch = _Watch(rank, size)
        dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"Rank {rank} of {size} found not all others at {where}: {_first_line(error)}") from error
    watch.start()
    try:
        ranks = Ranks.of_process_group()
        yield ranks
        ranks.wait()
    except BaseException as error:
        watch.end_with(error)
    watch.stop()
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


class _Watch(threading.Thread):
    """Keeps this process' pulse and listens for the next one's; ends this process when another one has ended.

    Args:
        rank: This process.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(daemon=True, name="lightning_drm-watch")
        self._rank, self._next = rank, (rank + 1) % size
        # A connection of its own: those who wait on another one hold it.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connection = TCPStore(address, port, is_master=False, timeout=_ASSEMBLY, wait_for_workers=False)
        self._store = PrefixStore("watch", connection)
        self._store.set(f"who {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._who = {other: self._store.get(f"who {other}").decode() for other in {0, self._next}}
        self._keeps_store = rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        self._stopped = threading.Event()
        self._known = threading.Event()
        self._ending = False
        self._verdict = ""  # what this process is to say; empty where another one does

    def stop(self) -> None:
        """Ends the watch: all processes are done."""
        self._stopped.set()
        self.join()

    def end_with(self, error: BaseException) -> None:
        """Ends this process, and with it all others.

        Args:
            error: What happened here: an error, an interruption by `run`, or a connection that another one's end broke.
        """
        self._ending = True
        if self._keeps_store:
            atexit.register(time.sleep, 2 * PULSE)  # until all others have heard that it is over
        if isinstance(error, RuntimeError | KeyboardInterrupt):
            self._known.wait(SILENCE + 2 * PULSE if _is_broken_connection(error) else 0)
        if not self._known.is_set() and self._claim(f"rank {self._rank}"):
            self._stopped.set()
            raise error
        self._stopped.set()
        if self._verdict:
            raise ValueError(self._verdict) from None
        time.sleep(1)  # torchrun stops all when the first one exits: let it be the one that says why
        sys.exit(2)

    def run(self) -> None:
        """Beats and listens until the watch is stopped or another process has ended."""
        last, heard = -1, time.monotonic()
        while not self._stopped.wait(PULSE):
            try:
                self._store.add(f"pulse {self._rank}", 1)
                pulse = self._store.add(f"pulse {self._next}", 0)
                if pulse != last:
                    last, heard = pulse, time.monotonic()
                is_over = self._store.check(["end"])
                if not is_over and time.monotonic() - heard > SILENCE and self._claim(self._next):
                    self._verdict = self._sentence(self._next)
                    is_over = True
            except RuntimeError:  # the store is gone, which rank 0 has, or torchrun
                if self._stopped.wait(1):
                    return
                self._verdict = self._sentence(0)
                is_over = True
            if is_over:
                self._end_this()
                return

    def _end_this(self) -> None:
        self._known.set()
        if not self._ending:
            _thread.interrupt_main()
        if not self._stopped.wait(GRACE):
            # In the middle of a long computation. What is written is safe: a journal tells what is whole.
            if self._verdict:
                print(f"lightning-drm: {self._verdict}", file=sys.stderr, flush=True)
            os._exit(2)

    def _claim(self, why: object) -> bool:
        """Whether it falls to this process to say why all end: the first one that wants to."""
        mine = json.dumps([self._rank, str(why)])
        try:
            return bool(self._store.compare_set("end", "", mine).decode() == mine)
        except RuntimeError:
            return True

    def _sentence(self, rank: int) -> str:
        return (
            f"Rank {rank} ({self._who[rank]}) ended without a word, so the others ended too. What they wrote is kept: "
            "give the same command again, with any number of processes."
        )


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed, and not what this process does by itself."""
    return isinstance(error, dist.DistError) or any(
        word in str(error).lower() for word in ("connection", "gloo", "socket", "peer")
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
