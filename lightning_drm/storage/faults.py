"""Faults of the surroundings: a full disk, a read-only folder, a limit on files. Told from mistakes, and given a name.

Libraries hide them: safetensors and tokenizers say the error's number in a text, torch's zip writer loses it.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_IN_A_TEXT = re.compile(r"\(os error (\d+)\)")
_OF_ZIP_FILES = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


class WriteError(OSError):
    """A file or folder could not be written, and it is nobody's mistake.

    Args:
        path: The file or folder.
        fault: What the system said.
    """

    def __init__(self, path: Path, fault: OSError) -> None:
        in_the_way = path.is_file() and fault.errno in (errno.EEXIST, errno.ENOTDIR)
        said = "There is a file where a folder is needed" if in_the_way else fault.strerror
        super().__init__(fault.errno, said, str(path))

    def __str__(self) -> str:
        return f"{self.filename} could not be written: {self.strerror}."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names what could not be written, where the system or a library does not, or names a temporary place.

    Args:
        path: The file or folder that is written meanwhile.

    Raises:
        WriteError: In place of an error about this path, or about a disk.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # libraries hide the system's error in any of theirs; what holds none is raised again
        fault = fault_behind(error)
        if fault is None or (place := _place(fault, path)) is None:
            raise
        raise WriteError(place, fault) from error


def fault_behind(error: BaseException) -> OSError | None:
    """What the system said, if that is what an error comes from.

    Args:
        error: Any error.

    Returns:
        An error with a number and a text; ``None`` if the error is none of the system's.
    """
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if number := _IN_A_TEXT.search(str(error)):
        return _fault(int(number[1]))
    if isinstance(error, ValueError):  # it says itself what is wrong
        return None
    behind = error.__cause__ or (error.__context__ if isinstance(error, RuntimeError) else None)
    if behind is not None and (fault := fault_behind(behind)):
        return fault
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OF_ZIP_FILES):
        return OSError(errno.EIO, "The disk is full, or does not take a file of this size")
    return None


def _fault(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _place(fault: OSError, path: Path) -> Path | None:
    """What could not be written, if an error is about a path: what is in it or above it, or where it is being made."""
    if fault.filename is None:
        return path if fault.errno in _OF_THE_DISK else None
    named, place = Path(os.fsdecode(fault.filename)).absolute(), path.absolute()
    if place.is_relative_to(named) or named.is_relative_to(place):
        return named
    beside = named.relative_to(place.parent).parts[0] if named.is_relative_to(place.parent) else ""
    return path if beside.startswith(f".{place.name}.") else None
