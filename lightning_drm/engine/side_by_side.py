"""Several parameters at a time on a CPU's cores, their results in order.

One small matrix does not keep many cores busy: half of an eigenproblem waits for memory, and counting and pruning have
parts that one core does alone. So two parameters are worked on at once, each by a thread with half of the cores. A
large one uses them all as well by itself, and gets them all: beside a long piece of work, the rest would soon have to
wait.

How many cores a parameter gets depends on its cost and on `torch.get_num_threads()` alone, never on what happens to run
beside it: BLAS rounds differently with different numbers of threads, and a merge should be the same each time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

AT_ONCE = 2
"""How many parameters are in memory at once. Measured on two cores; more would mean more memory, too."""

LARGE = 1e11
"""Cost, in the unit of `Method.cost`, from which a parameter gets all cores: about two seconds of one."""


class Cores:
    """The cores that this thread may use, for threads to share in halves.

    torch keeps its number of threads for each thread, but lets the last call decide for threads to come; `close` gives
    those back what this thread has.
    """

    def __init__(self) -> None:
        self.num_threads = torch.get_num_threads()
        self._free = AT_ONCE
        self._changed = Condition()

    @contextmanager
    def for_work_of(self, cost: float) -> Iterator[None]:
        """Waits for the cores that work of some cost gets, and keeps them while it is done in the calling thread."""
        parts = AT_ONCE if cost > LARGE else 1
        with self._changed:
            self._changed.wait_for(lambda: self._free >= parts)
            self._free -= parts
        torch.set_num_threads(max(1, self.num_threads * parts // AT_ONCE))
        try:
            yield
        finally:
            with self._changed:
                self._free += parts
                self._changed.notify_all()

    def close(self) -> None:
        """Makes this thread's number of threads the default again."""
        torch.set_num_threads(self.num_threads)


def side_by_side(work: Callable[[S, Cores], T], items: Iterable[S]) -> Iterator[T]:
    """The results of some work on each item, in order, up to two items being worked on at once.

    The item that the caller looks at counts: while it does, one is worked on. An error is raised when its item's turn
    comes.

    Args:
        work: Called with an item in one of two threads, and with the cores, which it takes when it starts to compute.
        items: Taken when their work begins.

    Example:
        >>> list(side_by_side(lambda item, cores: 2 * item, range(3)))
        [0, 2, 4]
    """
    cores, waiting = Cores(), iter(items)
    begun: deque[Future[T]] = deque()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lightning_drm-side-by-side") as threads:
        try:
            while True:
                for item in waiting:
                    begun.append(threads.submit(work, item, cores))
                    if len(begun) == AT_ONCE:
                        break
                if not begun:
                    return
                yield begun.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
            cores.close()
