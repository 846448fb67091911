"""Task vectors in safetensors files: written whole or not at all, read one parameter at a time."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_drm.deltas.fingerprint import fingerprint
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.merging import Delta, LowRank
from lightning_drm.storage import write_tensors

DELTAS_FILE = "deltas.safetensors"
HEAD_FILE = "head.safetensors"

_FORMAT = "lightning_drm.deltas/1"
# Not ".up": a module may have a parameter of that name.
_UP, _DOWN = "::up", "::down"


def save_task_vector(vector: TaskVector, folder: Path) -> None:
    """Stores a task vector as ``deltas.safetensors`` and ``head.safetensors``.

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
    write_tensors(folder / HEAD_FILE, vector.head, {"task": vector.task})
    write_tensors(
        folder / DELTAS_FILE,
        tensors,
        {
            "format": _FORMAT,
            "task": vector.task,
            "base_fingerprint": fingerprint(vector.base_hashes),
            "base_hashes": json.dumps(vector.base_hashes),
            "kinds": json.dumps(vector.kinds),
            "settings": json.dumps(vector.settings),
            "versions": json.dumps({name: version(name) for name in ("lightning_drm", "torch", "lightning")}),
        },
    )


def load_task_vector(folder: Path) -> TaskVector:
    """Opens a stored task vector; its deltas stay on disk until they are asked for.

    Args:
        folder: A folder that `save_task_vector` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the file is not a task vector of this format.
    """
    deltas = StoredDeltas(folder / DELTAS_FILE)
    return TaskVector(
        task=deltas.metadata["task"],
        deltas=deltas,
        kinds=json.loads(deltas.metadata["kinds"]),
        head=load_file(folder / HEAD_FILE),
        base_hashes=json.loads(deltas.metadata["base_hashes"]),
        settings=json.loads(deltas.metadata["settings"]),
    )


class StoredDeltas(Mapping[str, Delta]):
    """The deltas of one file, read when indexed.

    Args:
        path: A ``deltas.safetensors`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of deltas.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._open() as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                keys = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold deltas: it is damaged or no safetensors file ({error}).") from error
        if self.metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} does not hold deltas: expected format {_FORMAT!r}, got {self.metadata.get('format')!r}."
            )
        self._names = list(dict.fromkeys(key.removesuffix(_UP).removesuffix(_DOWN) for key in keys))
        self._low_rank = {key.removesuffix(_UP) for key in keys if key.endswith(_UP)}

    def _open(self) -> Any:  # safetensors ships no types
        return safe_open(self.path, framework="pt")

    def __getitem__(self, name: str) -> Delta:
        with self._open() as file:
            if name in self._low_rank:
                return LowRank(file.get_tensor(name + _UP), file.get_tensor(name + _DOWN))
            if name not in self._names:
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
