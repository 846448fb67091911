"""Reading the next item while the last one is worked on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; while the caller works on one, a thread produces the next one.

    Only one item is read ahead, so memory holds two. An error is raised when its item's turn comes.

    Args:
        items: Produced lazily; all of them in one thread, in order.

    Example:
        >>> list(read_ahead(map(str, range(3))))
        ['0', '1', '2']
    """
    iterator = iter(items)

    def take() -> list[T]:
        return list(islice(iterator, 1))

    with ThreadPoolExecutor(1, thread_name_prefix="lightning_drm-read-ahead") as thread:
        future = thread.submit(take)
        while taken := future.result():
            future = thread.submit(take)
            yield taken.pop()  # held by nobody here while the caller works on it
