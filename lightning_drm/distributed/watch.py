"""Processes that work together watch each other, so that none waits for one that is gone.

Each has a pulse in a key-value store, and listens for the next one's: a process that was killed can tell nobody, and
one that computes for minutes would not ask. When one ends before the others, all end, and say why.
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
from itertools import count

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from lightning_drm.distributed.ranks import Ranks

PULSE = 2.0  # seconds between two beats
SILENCE = 20.0  # seconds without a beat after which a process counts as dead
GRACE = 10.0  # seconds that a process gets to end by itself, which a long computation does not let it

_CONNECTING = timedelta(minutes=2)
_NUMBERS = count()


@contextmanager
def watched(ranks: Ranks, advice: str, *, one_speaks: bool = False) -> Iterator[Ranks]:
    """Lets some processes watch each other while they work; all enter it together, and all leave it together.

    Leaving it with an error ends the work of the others too.

    Args:
        ranks: The processes. Where there is no store at ``MASTER_ADDR`` and ``MASTER_PORT``, through which processes
            find each other as a rule, one that is gone is noticed at the next meeting only.
        advice: What to do after a process was killed; ends the message.
        one_speaks: Whether one process raises an error for all, and the rest exit quietly: for a command line, which
            would print it as often as there are processes.

    Yields:
        The same processes.

    Raises:
        ValueError: If another process was killed or failed, naming it.
    """
    if ranks.size == 1:
        yield ranks
        return
    ranks.wait()
    watch = _watch(ranks, advice)
    if not all(ranks.gather(watch is not None)) or watch is None:
        yield ranks
        return
    watch.start()
    try:
        yield ranks
        ranks.wait()
    except BaseException as error:
        watch.end_with(error, one_speaks)
    watch.stop()


def _watch(ranks: Ranks, advice: str) -> _Watch | None:
    """A watch that has not started; ``None`` where there is no store."""
    try:
        return _Watch(ranks.rank, ranks.size, advice)
    except (RuntimeError, KeyError):
        return None


class _Watch(threading.Thread):
    """Keeps this process' pulse and listens for the next one's; ends this process when another one has ended.

    Args:
        rank: This process.
        size: How many there are.
        advice: What to do after a process was killed.
    """

    def __init__(self, rank: int, size: int, advice: str) -> None:
        super().__init__(daemon=True, name="lightning_drm-watch")
        self._rank, self._next, self._advice = rank, (rank + 1) % size, advice
        # A connection of its own: those who wait on another one hold it.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connection = TCPStore(address, port, is_master=False, timeout=_CONNECTING, wait_for_workers=False)
        # Keys of its own: an earlier watch has left its, also one before torchrun started the processes again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"watch {attempt} {next(_NUMBERS)}", connection)
        self._store.set(f"who {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._who = {other: self._store.get(f"who {other}").decode() for other in {0, self._next}}
        self._keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._stopped = threading.Event()
        self._known = threading.Event()
        self._ending = False
        self._verdict = ""  # what this process is to say; empty where another one does

    def stop(self) -> None:
        """Ends the watch: all processes are done."""
        self._stopped.set()
        self.join()

    def end_with(self, error: BaseException, one_speaks: bool) -> None:
        """Ends the work of this process, and with it that of all others.

        Args:
            error: What happened here: an error, an interruption by `run`, or a connection that another one's end broke.
            one_speaks: Whether only one process says why.
        """
        self._ending = True
        if self._keeps_store:
            atexit.register(time.sleep, 2 * PULSE)  # until all others have heard that it is over
        is_own = not (_is_broken_connection(error) or isinstance(error, KeyboardInterrupt))
        if isinstance(error, RuntimeError | KeyboardInterrupt):
            self._known.wait(SILENCE + 2 * PULSE if _is_broken_connection(error) else 0)
        speaks = not self._known.is_set() and self._claim(f"rank {self._rank}")
        self._stopped.set()
        if speaks or (is_own and not one_speaks):
            raise error
        if self._verdict or not one_speaks:
            raise ValueError(self._verdict or self._hearsay()) from None
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

    def _hearsay(self) -> str:
        """Why all end, where it falls to another process to say so."""
        try:
            _, why = json.loads(self._store.get("end"))
        except RuntimeError:
            return "The processes that merge together have lost each other."
        return self._sentence(int(why)) if why.isdigit() else f"All ranks ended because {why} failed."

    def _sentence(self, rank: int) -> str:
        who = self._who.get(rank) or self._store.get(f"who {rank}").decode()
        return f"Rank {rank} ({who}) ended without a word, so the others ended too. {self._advice}"


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed, and not what this process does by itself."""
    return isinstance(error, dist.DistError) or any(
        word in str(error).lower() for word in ("connection", "gloo", "socket", "peer")
    )
