"""Large tensors a few rows at a time, and several of them at once.

Where every entry is merged by itself, a parameter need not be in memory: a piece of it is read, merged and written
while it is in the cache, in memory that the piece before it has just left. Whole parameters would cost a page fault for
every 4 KB of every delta, which takes longer than their arithmetic. Such work has little to compute and much to wait
for, so several threads do it side by side, each on a tensor of its own and with a single CPU core.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import prod
from threading import Barrier, BrokenBarrierError, Lock
from typing import TypeVar

import torch
from torch import Tensor

from lightning_drm.merging.linalg.selection import Reduce
from lightning_drm.merging.method import PIECE_STEP

PIECE = 1 << 20  # entries of a piece on the CPU
DEVICE_PIECE = 1 << 24  # and elsewhere: enough to occupy an accelerator
_MOST_THREADS = 8  # no more are needed to use all of a memory's bandwidth

T = TypeVar("T")
R = TypeVar("R")


def pieces(shape: tuple[int, ...], device: torch.device) -> list[slice | None]:
    """Divides a tensor's rows into pieces of about the same number of entries.

    Args:
        shape: The tensor's shape.
        device: Where pieces are worked on.

    Returns:
        The rows of each piece, or ``None`` for the tensor as it is. Pieces depend on nothing else, and start at a
        multiple of `PIECE_STEP` entries.

    Example:
        >>> pieces((40_000, 64), torch.device("cpu"))
        [slice(0, 16384, None), slice(16384, 32768, None), slice(32768, 40000, None)]
    """
    entries = PIECE if device.type == "cpu" else DEVICE_PIECE
    if prod(shape) <= entries:
        return [None]
    step = max(PIECE_STEP, entries // max(1, prod(shape[1:])) // PIECE_STEP * PIECE_STEP)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def largest_piece(shape: tuple[int, ...], device: torch.device) -> int:
    """How many entries the largest of a tensor's pieces has."""
    found = pieces(shape, device)
    return prod(shape) if found[0] is None else (found[0].stop - found[0].start) * prod(shape[1:])


def num_threads(device: torch.device) -> int:
    """How many tensors are worked on at once: two at least, since one may wait for the disk."""
    return min(max(2, torch.get_num_threads()), _MOST_THREADS) if device.type == "cpu" else 2


def side_by_side(
    work: Callable[[T], R], items: Sequence[T], threads: int, *, stop: Callable[[], None] | None = None
) -> Iterator[R]:
    """Does the same with every item, several at once, each in a thread of its own in which torch uses one CPU core.

    Args:
        work: What to do.
        items: With what; the first ones are begun first.
        threads: How many at once.
        stop: Called after an error or an interruption, before those that have begun are waited for.

    Yields:
        The results, as they come. The first error ends everything that has not begun.
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
        torch.set_num_threads(before)  # those that are started later would take over the last setting


def together(
    work: Callable[[Callable[[], Iterator[T]], Reduce], R], items: Sequence[T], reduce: Reduce, threads: int
) -> R:
    """Does one work in several threads, each on its share of the items, which meet to add up what they found.

    Args:
        work: Called with what iterates over a share, and with what sums a tensor over all shares; every call sums as
            often as the others, and gets the same results.
        items: What is shared out.
        reduce: Sums further, over ranks; called by one thread.
        threads: How many.

    Returns:
        What one call returned.
    """
    barrier, lock = Barrier(threads), Lock()
    sums: list[Tensor] = []

    def add_up(tensor: Tensor) -> Tensor:
        with lock:
            sums[:] = [sums[0] + tensor if sums else tensor]
        if barrier.wait() == 0:
            sums[0] = reduce(sums[0])
        barrier.wait()
        total = sums[0].clone()  # as its caller may change it
        if barrier.wait() == 0:
            sums.clear()
        barrier.wait()
        return total

    def one(part: int) -> list[R]:
        def share() -> Iterator[T]:
            for item in items[part::threads]:
                if barrier.broken:
                    raise BrokenBarrierError
                yield item

        try:
            return [work(share, add_up)]
        except BrokenBarrierError:  # another one has said why
            return []
        except BaseException:
            barrier.abort()
            raise

    parts = side_by_side(one, range(threads), threads, stop=barrier.abort)
    results = [result for found in parts for result in found]
    return results[0]
