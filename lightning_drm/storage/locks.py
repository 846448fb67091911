"""One process at a time: locks between processes, on all nodes that see the folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_drm.storage.faults import writing


@contextmanager
def only_one(path: Path, doing: str) -> Iterator[None]:
    """Keeps all other processes from doing the same work. The system frees the lock of a process that is killed.

    Args:
        path: The file or folder that is worked on. The lock is a hidden file beside it, which exists only while it is
            held.
        doing: What this process does, to complete "Another process is …".

    Raises:
        ValueError: If another process is doing it.
        WriteError: If the lock cannot be made.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"Another process is {doing}: wait until it has ended, or stop it.") from None
    try:
        yield
    finally:
        # Before the release: a process that has opened the file meanwhile sees that it is gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
