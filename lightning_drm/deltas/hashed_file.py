"""Safetensors files that hold the hash of each of their tensors, with which what is read is compared once.

A value in which a bit flipped on a disk looks like any other. The hash is xxh3 in 128 bits, as for the base.
``torch.hash_tensor`` would be no proof: it is the exclusive or of all values, in which two equal flips, or two values
that changed places, do not show.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_drm.deltas.fingerprint import fingerprint, hash_pieces, hash_tensor
from lightning_drm.storage import write_tensors
from lightning_drm.storage.json_files import parse_object

FACTORS = ("::up", "::down")
"""Ends of the names of a low-rank delta's factors; not ".up", as a module may have a parameter of that name."""

_HASHES = "tensor_hashes"  # files that older versions wrote have none
_PIECE = 16 << 20  # bytes that are hashed at once


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a file of a run folder, such as a stored head.

    Args:
        path: A safetensors file.
        what: What it holds, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    file = HashedFile(path, what)
    return {name: file.read(name) for name in file.headers}


def write_hashed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors with the hash of each.

    Args:
        path: The file.
        tensors: By name, on any device.
        metadata: What else the file says of itself.
    """
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {name: hash_tensor(tensor) for name, tensor in here.items()}
    write_tensors(path, here, {**metadata, _HASHES: json.dumps(hashes)})


class HashedFile:
    """A safetensors file with the hash of each tensor.

    Args:
        path: The file.
        what: What it holds, for messages.
        remedy: What to do about values that changed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """

    def __init__(self, path: Path, what: str, remedy: str = "finetune the task again") -> None:
        self.path = path
        self._remedy = remedy
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
                    task, plain = self.metadata.get("task"), name.removesuffix(FACTORS[0]).removesuffix(FACTORS[1])
                    raise ValueError(
                        f"{self.path} is damaged: the values of {plain} of task {task!r} are not those that were "
                        f"written; {self._remedy}."
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
