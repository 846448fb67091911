"""Ranks that work together notice when one of them dies or fails; then all of them end, and one of them says why.

A killed process can tell nobody, and a process that computes for minutes does not ask. So rank 0 holds a connection to
every rank, on which nothing is sent while all is well. When a process dies, its kernel closes the connection, and a
thread that waits for exactly that wakes up: on rank 0 for every other rank, on the other ranks for rank 0. A busy rank
never counts as dead, however long it computes or holds the interpreter's lock, because nobody waits for it to say
something. A node without power or network closes nothing, but the kernel's own probes find it.

A rank that fails or is stopped says so. The others have a moment to end by themselves before they are interrupted, as
the same mistake or signal often reaches all of them, and each knows best what to say of it.

The first end that rank 0 hears of counts. Where it finds several at once, as its interpreter's lock was held, a death
does: a rank that failed beside it was in a meeting, which broke. Rank 0 tells all ranks, and so each of them knows
whether it has to speak. If rank 0 itself dies, the others know without being told.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple, NoReturn

from lightning_drm.distributed.ranks import Ranks

GRACE = 10.0  # seconds that a process gets to end by itself; a long computation does not let it

_CONNECTING = 60.0  # seconds for all ranks to connect to rank 0
_NEWS = 1.0  # seconds that the news of a death may take: a meeting breaks at the same moment
_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}  # a node is lost after 45 s without an answer
_WORD = struct.Struct("!i??")

Speaker = Literal["each", "one", "launcher"]


@contextmanager
def watched(ranks: Ranks, advice: str, *, speaker: Speaker = "each") -> Iterator[Ranks]:
    """Ends the work of all ranks when one of them dies or leaves with an error.

    All ranks enter and leave it together. When one ends early, the main threads of the others are interrupted; when one
    is stopped by a signal, after `GRACE` seconds. A process that does not react within `GRACE` seconds, in the middle
    of a long computation or because it entered in another thread than the main one, is ended with exit code 2.
    Inside of another watch it does nothing, as that one has the same ranks.

    Args:
        ranks: All ranks, which work together. A single one needs no watch.
        advice: What to do after a rank died; the last sentence of the error.
        speaker: Who says why all ranks end. ``"each"``: every rank raises an error. ``"one"``: one rank raises an
            error and the others exit quietly with code 2, for a command line, which would otherwise print it once per
            rank. ``"launcher"``: like ``"one"``, except that the process that started the ranks reports a death.

    Yields:
        The same ranks.

    Raises:
        ValueError: If another rank died or failed, naming it; or if the ranks cannot connect to rank 0.
    """
    if ranks.size == 1 or _Watch.is_on:
        yield ranks
        return
    watch = _Watch(ranks, advice, speaker)
    _Watch.is_on = True
    try:
        watch.start()  # in here, since another rank may fail at once, and interrupt this one
        yield ranks
        watch.leave()
    except BaseException as error:
        watch.end_with(error)
    finally:
        _Watch.is_on = False


def is_interruption(error: BaseException | None) -> bool:
    """Whether an error came of SIGINT, which Lightning turns into ``SystemExit(1)`` in its loops."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


class _End(NamedTuple):
    """Why all ranks end: the rank that ended first; and whether it died, was stopped by a signal, or else failed."""

    rank: int
    died: bool
    stopped: bool = False


_DONE = _End(-1, died=False)  # what a rank says that is done, and rank 0 once all are


class _Watch(threading.Thread):
    """Listens for the end of another rank, and then ends the work of this process; arguments as of `watched`."""

    is_on = False  # in this process

    def __init__(self, ranks: Ranks, advice: str, speaker: Speaker) -> None:
        super().__init__(daemon=True, name="lightning_drm-watch")
        self._rank, self._advice, self._speaker = ranks.rank, advice, speaker
        self._names = ranks.gather(f"process {os.getpid()} on {socket.gethostname()}")
        self._to_first, self._peers = _connect(ranks)
        self._can_interrupt = threading.current_thread() is threading.main_thread()
        self._interrupts = False
        self._end: _End | None = None
        self._ending = threading.Event()  # this process, with an error of its own
        self._settled = threading.Event()  # whether all ranks end, and why
        self._noticed = threading.Event()  # by the thread that is watched

    def leave(self) -> None:
        """Waits for all ranks to be done, and ends the watch."""
        _tell(self._to_first, _DONE)
        self.join()
        self._close()

    def end_with(self, error: BaseException) -> NoReturn:
        """Ends the work of this process, and with it that of all other ranks.

        Args:
            error: An error of its own, an interruption by the watch, or a meeting that broke when another rank died.
        """
        self._can_interrupt = False
        self._ending.set()
        own = _End(self._rank, died=False, stopped=isinstance(error, SystemExit | KeyboardInterrupt))
        with suppress(KeyboardInterrupt):  # from the watch, which was just about to, or from an impatient person
            if isinstance(error, RuntimeError):  # perhaps a meeting that broke
                self._settled.wait(_NEWS)
            _tell(self._to_first, own)
            self._settled.wait()  # rank 0 answers or dies, though perhaps not before its interpreter's lock is free
        self._noticed.set()
        end = self._end or own
        if self._speaker == "each":
            self._close()
            interrupted = self._interrupts and is_interruption(error) and not end.stopped
            if end.rank != self._rank and (interrupted or isinstance(error, RuntimeError)):
                raise ValueError(self._sentence(end)) from error
            raise error
        if self._rank != self._speaking_rank(end):
            self._let_speak(end)
            sys.exit(2)
        if end != own:
            raise ValueError(self._sentence(end)) from None
        raise error

    def run(self) -> None:
        """Listens until all ranks are done, or until one of them has ended."""
        done: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self._end is None and len(done) < len(self._peers):
                heard = {key.data: _hear(self._peers[key.data]) for key, _ in selector.select()}
                done |= {rank for rank, word in heard.items() if word == _DONE}
                self._end = _end_of(heard)
        if self._rank == 0:
            for peer in self._peers.values():
                _tell(peer, self._end or _DONE)
        if self._end is not None and not self._end.died:
            self._ending.wait(GRACE if self._end.stopped else _NEWS)
        # Lightning ignores the signal while it ends a loop, because of an earlier one that came from elsewhere.
        if self._end is not None and self._can_interrupt and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._interrupts = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it from waiting too
        self._settled.set()
        if self._end is not None and not self._noticed.wait(GRACE):
            if self._speaker == "each" or self._rank == self._speaking_rank(self._end):
                print(f"lightning-drm: {self._sentence(self._end)}", file=sys.stderr, flush=True)
            os._exit(2)  # what is written is safe: a journal tells what is whole

    def _speaking_rank(self, end: _End) -> int | None:
        """The rank that says why all end; ``None`` if the launcher does."""
        if not end.died:
            return end.rank
        if self._speaker == "launcher":
            return None
        return 1 if end.rank == 0 else 0

    def _let_speak(self, end: _End) -> None:
        """Waits until another rank has spoken: when one process exits, torchrun and srun end the others."""
        if self._speaking_rank(end) is None:
            time.sleep(GRACE)  # the launcher ends this process long before
            return
        peer = self._peers[0 if self._rank else end.rank]  # all wait for rank 0, and rank 0 for the one that failed
        peer.settimeout(GRACE)
        while _hear(peer):
            pass

    def _close(self) -> None:
        for peer in (self._to_first, *self._peers.values()):
            peer.close()

    def _sentence(self, end: _End) -> str:
        who = f"Rank {end.rank} ({self._names[end.rank]})"
        if end.died:
            return f"{who} died without an error message, so the other ranks ended too. {self._advice}"
        return f"{who} {'was stopped' if end.stopped else 'failed'}, so the other ranks ended too."


def _end_of(heard: Mapping[int, _End | None]) -> _End | None:
    """Why all ranks end, if they do, by what was heard at once.

    Args:
        heard: By rank, its word; ``None`` from one that died.
    """
    ends = [word or _End(rank, died=True) for rank, word in heard.items() if word != _DONE]
    return next((end for end in ends if end.died), ends[0] if ends else None)


def _connect(ranks: Ranks) -> tuple[socket.socket, dict[int, socket.socket]]:
    """Connects every rank with rank 0, also rank 0 with itself.

    Returns:
        This rank's connection to rank 0; and the connections that its watch listens to, by the rank at the other end.
    """
    where = "its own port"
    try:
        if ranks.is_first:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=ranks.size) as server:
                ranks.gather((socket.gethostname(), server.getsockname()[1]))
                peers = _accept(server, ranks.size)
            to_first, peers[0] = socket.socketpair()
        else:
            host, port = ranks.gather(None)[0]
            host = os.environ.get("MASTER_ADDR", host)  # where all ranks have found rank 0 before
            where = f"{host}:{port}"
            to_first = socket.create_connection((host, port), _CONNECTING)
            to_first.sendall(_WORD.pack(*_End(ranks.rank, died=False)))
            peers = {0: to_first}
    except OSError as error:
        raise ValueError(f"Rank {ranks.rank} did not get a connection at {where}: {error}.") from error
    for peer in peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if peer.family != socket.AF_UNIX and hasattr(socket, name):  # macOS has no TCP_KEEPIDLE
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return to_first, peers


def _accept(server: socket.socket, size: int) -> dict[int, socket.socket]:
    """Rank 0's connections with the others, by rank."""
    peers: dict[int, socket.socket] = {}
    server.settimeout(_CONNECTING)
    while len(peers) < size - 1:
        peer, _ = server.accept()
        peer.settimeout(_CONNECTING)
        word = _hear(peer)
        if word is not None and 0 < word.rank < size:  # or it is a stranger
            peers[word.rank] = peer
    return peers


def _tell(peer: socket.socket, word: _End) -> None:
    with suppress(OSError):  # a rank that died, which those who listen to it notice
        peer.sendall(_WORD.pack(*word))


def _hear(peer: socket.socket) -> _End | None:
    """The next word of another rank; ``None`` if there will not be one, since it died."""
    data = b""
    with suppress(OSError):
        while len(data) < _WORD.size and (more := peer.recv(_WORD.size - len(data))):
            data += more
    return _End(*_WORD.unpack(data)) if len(data) == _WORD.size else None
