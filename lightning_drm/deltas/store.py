"""Task vectors in safetensors files: written whole or not at all, read one parameter at a time.

A file holds the hash of each of its tensors, and what is read is compared with it once: a delta in which a bit flipped
on a disk looks like any other. The hash is xxh3 in 128 bits, as for the base. ``torch.hash_tensor`` would be no proof:
it is the exclusive or of all values, in which two equal flips, or two values that changed places, do not show.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_drm.deltas.fingerprint import fingerprint, hash_pieces, hash_tensor
from lightning_drm.deltas.kinds import Kind
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.merging import Delta, LowRank, LowRankStack
from lightning_drm.storage import write_tensors
from lightning_drm.storage.json_files import parse_object, shown

DELTAS_FILE = "deltas.safetensors"
HEAD_FILE = "head.safetensors"

_FORMAT = "lightning_drm.deltas/1"
_HASHES = "tensor_hashes"  # files that older versions wrote have none
_NUM_STEPS = "num_steps"  # nor this
_PIECE = 16 << 20  # bytes that are hashed at once
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
    _write(folder / HEAD_FILE, vector.head, {"task": vector.task})
    _write(
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


def load_task_vector(folder: Path) -> TaskVector:
    """Opens a stored task vector; its deltas stay on disk until they are asked for.

    Args:
        folder: A folder that `save_task_vector` wrote.

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
    )


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a file of a run folder, such as a stored head.

    Args:
        path: A safetensors file.
        what: What it holds, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    file = _HashedFile(path, what)
    return {name: file.read(name) for name in file.headers}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {name: hash_tensor(tensor) for name, tensor in here.items()}
    write_tensors(path, here, {**metadata, _HASHES: json.dumps(hashes)})


class _HashedFile:
    """A safetensors file with the hash of each tensor.

    Args:
        path: The file.
        what: What it holds, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        try:
            with self._open() as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                # Mapped, not read.
                self.headers = {name: file.get_tensor(name).to("meta") for name in list(file.keys())}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold {what}: it is damaged or no safetensors file ({error}).") from error
        self._hashes = self.described(_HASHES) if _HASHES in self.metadata else None
        if self._hashes is not None and self._hashes.keys() != self.headers.keys():
            wrong = sorted(self._hashes.keys() ^ self.headers.keys())
            raise ValueError(f"{path} is damaged: {wrong[0]} is not both in the file and in its list of hashes.")
        self._verified: set[str] = set()

    def described(self, name: str) -> dict[str, Any]:
        """An object in the file's metadata.

        Raises:
            ValueError: If it is not there, or damaged.
        """
        if name not in self.metadata:
            raise ValueError(f"{self.path} is damaged: it has no {name} in its metadata.")
        return parse_object(self.metadata[name], f"{self.path} is damaged: {name} in its metadata")

    @property
    def fingerprint(self) -> str | None:
        """One hash over those of all tensors."""
        return fingerprint(self._hashes) if self._hashes is not None else None

    def read(self, name: str) -> Tensor:
        """A tensor, mapped; its values are compared with their hash at the first reading.

        Raises:
            ValueError: If they differ.
        """
        with self._open() as file:
            if self._hashes is not None and name not in self._verified:
                if self._hash(file, name) != self._hashes[name]:
                    task = self.metadata.get("task")
                    raise ValueError(
                        f"{self.path} is damaged: the values of {name.removesuffix(_UP).removesuffix(_DOWN)} of task "
                        f"{task!r} are not those that were written; finetune the task again."
                    )
                self._verified.add(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def _hash(self, file: Any, name: str) -> str:
        """Read piece by piece, as all of a mapped tensor would count as this process's memory."""
        header = self.headers[name]
        if not header.shape or not header.numel():
            return hash_tensor(file.get_tensor(name))
        rows = max(1, _PIECE * len(header) // header.nbytes)
        part = file.get_slice(name)
        return hash_pieces(header.shape, header.dtype, (part[i : i + rows] for i in range(0, len(header), rows)))

    def _open(self) -> Any:  # safetensors ships no types
        return safe_open(self.path, framework="pt")


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
        self._file = _HashedFile(path, "deltas")
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)
