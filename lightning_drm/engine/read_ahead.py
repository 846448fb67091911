"""Reading the next item while the last one is worked on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next of which is produced by a thread while the caller works on the present one.

    Only one item is ahead, so memory holds two. An error is raised when its item's turn comes.

    Args:
        items: Produced lazily; all of them in one thread, in order.

    Example:
        >>> list(read_ahead(map(str, range(3))))
        ['0', '1', '2']
    """
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="lightning_drm-read-ahead") as thread:
        future = thread.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # `end` has no type that mypy could narrow by
            del item
