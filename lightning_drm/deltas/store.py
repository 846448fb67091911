"""Task vectors in safetensors files: written whole or not at all, read one parameter at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from lightning_drm.deltas.fingerprint import fingerprint
from lightning_drm.deltas.hashed_file import FACTORS, HashedFile, load_tensors, write_hashed
from lightning_drm.deltas.kinds import Kind
from lightning_drm.deltas.statistics import load_statistics, save_statistics
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.merging import Delta, LowRank, LowRankStack
from lightning_drm.storage.json_files import shown

DELTAS_FILE = "deltas.safetensors"
HEAD_FILE = "head.safetensors"

_FORMAT = "lightning_drm.deltas/1"
_NUM_STEPS = "num_steps"  # files that older versions wrote have none
_UP, _DOWN = FACTORS


def save_task_vector(vector: TaskVector, folder: Path) -> None:
    """Stores a task vector as ``deltas.safetensors``, ``head.safetensors`` and, if it has any, its statistics.

    Args:
        vector: The task vector.
        folder: The task's folder; made if missing.
    """
    tensors: dict[str, Tensor] = {}
    for name, delta in vector.deltas.items():
        if isinstance(delta, LowRank):
            tensors[name + _UP], tensors[name + _DOWN] = delta.up, delta.down
        else:
            tensors[name] = delta
    write_hashed(folder / HEAD_FILE, vector.head, {"task": vector.task})
    write_hashed(
        folder / DELTAS_FILE,
        tensors,
        {
            "format": _FORMAT,
            "task": vector.task,
            "base_fingerprint": fingerprint(vector.base_hashes),
            "base_hashes": json.dumps(vector.base_hashes),
            "kinds": json.dumps(vector.kinds),
            "settings": json.dumps(vector.settings),
            _NUM_STEPS: json.dumps(vector.num_steps),
            "versions": json.dumps({name: version(name) for name in ("lightning_drm", "torch", "lightning")}),
        },
    )
    if vector.statistics is not None:
        save_statistics(vector.statistics, folder, vector.task, StoredDeltas(folder / DELTAS_FILE).fingerprint)


def load_task_vector(folder: Path, *, statistics: bool = True) -> TaskVector:
    """Opens a stored task vector; its deltas and statistics stay on disk until they are asked for.

    Args:
        folder: A folder that `save_task_vector` wrote.
        statistics: Whether to open the statistics, too.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the file is not a task vector of this format, or is damaged.
    """
    deltas = StoredDeltas(folder / DELTAS_FILE)
    return TaskVector(
        task=deltas.metadata["task"],
        deltas=deltas,
        kinds=deltas.kinds(),
        head=load_tensors(folder / HEAD_FILE, "a head"),
        base_hashes=deltas.base_hashes(),
        settings=deltas.described("settings"),
        num_steps=deltas.num_steps(),
        statistics=load_statistics(folder, deltas.fingerprint) if statistics else None,
    )


class StoredDeltas(Mapping[str, Delta]):
    """The deltas of one file, read when indexed.

    Args:
        path: A ``deltas.safetensors`` file.

    Attributes:
        path: The file.
        metadata: What it says of itself.
        headers: By name, each delta without its values, on the meta device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of deltas, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path, "deltas")
        self.path, self.metadata = path, self._file.metadata
        if self.metadata.get("format") != _FORMAT:
            found = shown(self.metadata.get("format"))
            raise ValueError(f"{path} does not hold deltas: expected format {_FORMAT!r}, got {found}.")
        if "task" not in self.metadata:
            raise ValueError(f"{path} is damaged: it does not say which task its deltas are of.")
        names = dict.fromkeys(key.removesuffix(_UP).removesuffix(_DOWN) for key in self._file.headers)
        self.headers = {name: self._assemble(name, self._file.headers.get) for name in names}

    def described(self, name: str) -> dict[str, Any]:
        """An object in the file's metadata.

        Raises:
            ValueError: If it is not there, or damaged.
        """
        return self._file.described(name)

    @property
    def fingerprint(self) -> str | None:
        """What tells these deltas from others; ``None`` for files of older versions, which hold no hashes."""
        return self._file.fingerprint

    def base_hashes(self) -> dict[str, str]:
        """Hash by name of every backbone parameter that the task started from.

        Raises:
            ValueError: If they are damaged.
        """
        hashes = self.described("base_hashes")
        if wrong := [name for name, value in hashes.items() if not isinstance(value, str)]:
            raise ValueError(f"{self.path} is damaged: the hash of the base's {wrong[0]} is no text.")
        return hashes

    def kinds(self) -> dict[str, Kind]:
        """What each parameter is to its layer.

        Raises:
            ValueError: If this is damaged.
        """
        kinds = self.described("kinds")
        if wrong := [name for name in self.headers if kinds.get(name) not in get_args(Kind)]:
            raise ValueError(f"{self.path} is damaged: it does not say what {wrong[0]} is to its layer.")
        return cast(dict[str, Kind], kinds)

    def num_steps(self) -> int | None:
        """How many optimizer steps the finetune took; ``None`` where that is not known.

        Raises:
            ValueError: If this is damaged.
        """
        stored = self.metadata.get(_NUM_STEPS, "null")
        if stored != "null" and not stored.isdecimal():
            raise ValueError(f"{self.path} is damaged: its number of steps is {shown(stored)}.")
        return None if stored == "null" else int(stored)

    def __getitem__(self, name: str) -> Delta:
        if name not in self.headers:
            raise KeyError(name)
        return self._assemble(name, self._file.read)

    def _assemble(self, name: str, part: Callable[[str], Tensor | None]) -> Delta:
        """A delta from its parts in the file."""
        keys = [name] if name in self._file.headers else [name + _UP, name + _DOWN]
        parts = [part(key) for key in keys]
        tensors = [tensor for tensor in parts if tensor is not None and tensor.is_floating_point()]
        if len(tensors) < len(parts):
            raise ValueError(f"{self.path} is damaged: {name} is no delta in floats, or lacks one of two factors.")
        if len(tensors) == 1:
            return tensors[0]
        up, down = tensors
        try:
            return LowRankStack(up, down) if up.dim() == 3 else LowRank(up, down)
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged: {name} has factors of shapes {tuple(up.shape)}, {tuple(down.shape)}."
            ) from error

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the delta
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)
