"""A limit of time for code that might not end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """No `Exception`: what catches those, for files that fail in any way, must not take this for one of them."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops what runs in it on the main thread, with `OutOfTime`, unless it ends in time."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
