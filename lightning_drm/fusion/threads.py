"""Several tensors at once, each in a thread of its own.

What is merged a few rows at a time has little to compute and much to wait for, so several threads do it side by side,
each on a tensor of its own and with a single CPU core.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Barrier, BrokenBarrierError, Lock
from typing import TypeVar

import torch
from torch import Tensor

from lightning_drm.merging.linalg.selection import Reduce

_MOST_THREADS = 8  # more are not needed to use all of a memory's bandwidth

T = TypeVar("T")
R = TypeVar("R")


def num_threads(device: torch.device) -> int:
    """How many tensors are worked on at once: at least two, since one may wait for the disk."""
    return min(max(2, torch.get_num_threads()), _MOST_THREADS) if device.type == "cpu" else 2


def side_by_side(
    work: Callable[[T], R], items: Sequence[T], threads: int, *, stop: Callable[[], None] | None = None
) -> Iterator[R]:
    """Does the same work on every item, several at once, each in a thread in which torch uses one CPU core.

    Args:
        work: What to do with an item.
        items: The items; the first ones are begun first.
        threads: How many items are worked on at once.
        stop: Called after an error or an interruption, before the threads that are at work are waited for.

    Yields:
        The results as they come. After the first error, no further item is begun.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "lightning_drm-side-by-side", torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                if stop is not None:
                    stop()
                raise
    finally:
        torch.set_num_threads(before)  # threads that are started later would inherit the last setting


def summed_over_threads(
    work: Callable[[Callable[[], Iterator[T]], Reduce], R], items: Sequence[T], reduce: Reduce, threads: int
) -> R:
    """Runs the same work in several threads, each on its own items; they meet to add up what they found.

    Args:
        work: Called in each thread, with a function that iterates over the thread's items, and with one that sums a
            tensor over all threads. Every call of it must sum equally often; all get the same results.
        items: What is divided among the threads.
        reduce: Sums further, over ranks; one thread calls it.
        threads: How many threads.

    Returns:
        What one of the calls returned.
    """
    barrier, lock = Barrier(threads), Lock()
    sums: list[Tensor] = []

    def add_up(tensor: Tensor) -> Tensor:
        with lock:
            sums[:] = [sums[0] + tensor if sums else tensor]
        if barrier.wait() == 0:
            sums[0] = reduce(sums[0])
        barrier.wait()
        total = sums[0].clone()  # the caller may change it
        if barrier.wait() == 0:
            sums.clear()
        barrier.wait()
        return total

    def in_thread(number: int) -> list[R]:
        def own_items() -> Iterator[T]:
            for item in items[number::threads]:
                if barrier.broken:
                    raise BrokenBarrierError
                yield item

        try:
            return [work(own_items, add_up)]
        except BrokenBarrierError:  # another thread has raised the error
            return []
        except BaseException:
            barrier.abort()
            raise

    found = side_by_side(in_thread, range(threads), threads, stop=barrier.abort)
    results = [result for of_thread in found for result in of_thread]
    return results[0]
