"""Files and folders that are whole or not there, whatever happens while they are written."""

import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DAY = 86400.0


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a place to write to; what is written there takes its name when it is whole, and replaces what has it.

    What killed processes have left of the same file or folder is removed.

    Args:
        path: The file or folder.

    Yields:
        Where to write it. It is in a hidden folder of this process, in which a library may leave more than the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        if _is_left(old, old.name.removeprefix(f".{path.name}.")):
            shutil.rmtree(old, ignore_errors=True)
    place = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    place.mkdir()
    try:
        yield place / path.name
        if path.is_dir():  # deleting it takes time, in which half a folder would stand under its name
            path.rename(place / ".replaced")
        (place / path.name).replace(path)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_left(folder: Path, writer: str) -> bool:
    """Whether its writer is dead: known on the same host, else when the folder is a day old."""
    host, _, process = writer.rpartition("-")
    if not process.isdigit():
        return False
    if host != socket.gethostname():
        return folder.exists() and time.time() - folder.stat().st_mtime > _DAY
    if int(process) == os.getpid():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
