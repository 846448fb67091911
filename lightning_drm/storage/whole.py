"""Files and folders that are whole or not there, whatever happens while they are written."""

import glob
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_drm.storage.faults import writing

_DAY = 86400.0


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a place to write to; what is written there is moved to `path` when it is whole, and replaces what is there.

    Leftovers of killed processes that wrote the same file or folder are removed.

    Args:
        path: The file or folder.

    Yields:
        Where to write it: in a hidden folder of this process, in which a library may leave other files, too.

    Raises:
        WriteError: If the disk is full, or something else keeps it from being written.
    """
    with writing(path), _made_apart(path) as place:
        yield place


@contextmanager
def _made_apart(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        if _is_left(old, old.name.removeprefix(f".{path.name}.")):
            shutil.rmtree(old, ignore_errors=True)
    place = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    place.mkdir()
    try:
        yield place / path.name
        new, old = place / path.name, place / ".replaced"
        for file in [new, *new.rglob("*")]:
            if file.is_file():  # safetensors writes 0600, which nobody else in a team's shared folder can read
                file.chmod(0o666 & ~_umask())
        if path.is_dir() and new.is_dir():  # deleting it takes time, during which half a folder would have this name
            path.rename(old)
        try:
            new.replace(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a text file whole or not at all."""
    with written_whole(path) as place:
        place.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all.

    Args:
        path: The file; its folder is made if it is missing.
        tensors: By name, tensors on any device.
        metadata: Strings for the file's header.
    """
    with written_whole(path) as place:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, place, dict(metadata or {}))


def _is_left(folder: Path, writer: str) -> bool:
    """Whether the writer is dead: known on the same host, and taken for granted on others after a day."""
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
