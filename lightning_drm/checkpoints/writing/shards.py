"""Safetensors shards that are written tensor by tensor, and can be continued after a kill.

`safetensors.save_file` needs all tensors of a file in memory at once. But the plan knows names, shapes and types, so
each file's header is written first, and then every tensor at the offset that the header promises. For the same reason,
several processes can write one file, and the files do not depend on the number of processes. Beside the shards, every
process keeps a journal that notes each finished tensor with the hash of its bytes. A later run, with any number of
processes, takes up the tensors whose bytes are still what the journals say, even after a crash of the machine.
"""

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np
import torch
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from numpy.typing import NDArray
from torch import Tensor

from lightning_drm.checkpoints.reading import TensorHeader
from lightning_drm.checkpoints.reading.tensors import DTYPES
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.fusion.threads import num_threads, side_by_side
from lightning_drm.storage import write_json, write_text, writing

JOURNAL_FILE = ".journal.jsonl"
INDEX_FILE = "model.safetensors.index.json"

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    size: int


class ShardWriter:
    """Writes a model's tensors into shards.

    Args:
        folder: Where to write; a folder with the journal of the same merge is continued.
        headers: By name, every tensor that will be written.
        max_shard_size: Largest size of a file, such as ``"5GB"``.
        identity: Tells this merge from others; the journal of another merge is discarded.
        ranks: The processes that write together, all of which make the same writer; this one alone if left out.

    Attributes:
        done: By name, what the journals say of each tensor that is written: those that an interrupted merge left, and
            those that this process has written since.
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, TensorHeader],
        max_shard_size: str,
        identity: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.folder = folder
        self.headers = headers
        meta = {name: torch.empty(h.shape, dtype=h.dtype, device="meta") for name, h in headers.items()}
        self._split = split_torch_state_dict_into_shards(
            meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._places: dict[str, _Place] = {}
        self._prefixes: dict[Path, bytes] = {}
        for filename, names in self._split.filename_to_tensors.items():
            self._lay_out(folder / filename, names)
        first = json.dumps({"identity": identity}) + "\n"
        if self._ranks.is_first:
            kept = self._resume(identity)
            write_text(folder / JOURNAL_FILE, first + "".join(json.dumps(record) + "\n" for record in kept.values()))
            for old in folder.glob(_journal_of("*")):
                old.unlink()
        self._ranks.wait()
        # Nobody writes into the common journal any more. All ranks must read the same, or their shares would differ.
        kept_lines = _whole_lines(folder / JOURNAL_FILE)[1:]
        self.done: dict[str, dict[str, Any]] = {record["name"]: record for record in kept_lines}
        self._journal = folder / _journal_of(self._ranks.rank)
        with writing(self._journal):
            self._journal.write_text(first)
        self._written: list[str] = []
        self._lock = Lock()

    @property
    def order(self) -> list[str]:
        """All names, file by file."""
        return [name for names in self._split.filename_to_tensors.values() for name in names]

    def _lay_out(self, file: Path, names: list[str]) -> None:
        # Wide types first keeps every tensor aligned to its own size.
        ordered = sorted(names, key=lambda name: -self.headers[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in ordered:
            tensor = self.headers[name]
            size = prod(tensor.shape) * tensor.dtype.itemsize
            code = _CODES[tensor.dtype]
            header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._prefixes[file] = len(text).to_bytes(8, "little") + text
        for name in ordered:
            begin, end = header[name]["data_offsets"]
            self._places[name] = _Place(file, len(self._prefixes[file]) + begin, end - begin)

    def _resume(self, identity: str) -> dict[str, dict[str, Any]]:
        """The records of an interrupted merge that still hold; if none does, makes empty files."""
        journals = [_whole_lines(file) for file in sorted(self.folder.glob(f"{JOURNAL_FILE}*"))]
        same = [lines[1:] for lines in journals if lines and lines[0].get("identity") == identity]
        if same and all(file.is_file() for file in self._prefixes):
            records = {r["name"]: r for lines in same for r in lines if r.get("name") in self._places}
            hashes = self._hashes(list(records))
            return {name: record for name, record in records.items() if hashes[name] == record["hash"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        for file, prefix in self._prefixes.items():
            end = max(place.offset + place.size for place in self._places.values() if place.file == file)
            with writing(file), file.open("wb") as stream:
                stream.write(prefix)
                stream.truncate(end)
        return {}

    def write(self, name: str, pieces: Iterable[Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Writes one tensor and notes it; several threads may write different ones.

        Args:
            name: Its name.
            pieces: Its values, of the announced type: piece after piece, or all at once.
            record: What else to keep in the journal; it is looked at after the last piece.
        """
        header, place = self.headers[name], self._places[name]
        digest, offset = xxhash.xxh3_128(), place.offset
        for piece in pieces:
            assert piece.dtype == header.dtype, f"{name}: {piece.dtype} is not {header.dtype}"
            data = _bytes(piece)
            self._put(place.file, offset, data)
            digest.update(data.data)
            offset += data.size
        assert offset == place.offset + place.size, f"{name}: {offset - place.offset} bytes do not fill {header.shape}"
        line = {"name": name, "hash": digest.hexdigest(), **(record or {})}
        with self._lock:
            with writing(self._journal), self._journal.open("a") as journal:
                journal.write(json.dumps(line) + "\n")
            self.done[name] = line
            self._written.append(name)

    def _put(self, file: Path, offset: int, data: NDArray[np.uint8]) -> None:
        # Closing a file drops all locks of this process on it, even those that another thread has just taken.
        locked = self._lock if self._ranks.size > 1 else nullcontext()
        with writing(file), locked, file.open("r+b", buffering=0) as stream:
            if self._ranks.size > 1:
                _lock(stream, offset, data.size)
            stream.seek(offset)
            view = data.data
            while view:  # the kernel takes at most 2 GB at once
                view = view[stream.write(view) :]

    def collect(self) -> list[dict[str, Any]]:
        """Reads back what this process wrote, and waits for all others to have done the same.

        Returns:
            The records of all journals, in the order of `order`.

        Raises:
            ValueError: If files are not what was written.
        """
        hashes = self._hashes(self._written)
        changed = [name for name in self._written if hashes[name] != self.done[name]["hash"]]
        if changed:
            raise ValueError(
                f"{self.folder} was changed by another program while it was written: {', '.join(changed[:3])}."
            )
        for written in self._ranks.gather([self.done[name] for name in self._written]):
            self.done.update({record["name"]: record for record in written})
        return [self.done[name] for name in self.order]

    def _hashes(self, names: Sequence[str]) -> dict[str, str]:
        return dict(side_by_side(lambda name: (name, self._hash(name)), names, num_threads(torch.device("cpu"))))

    def _hash(self, name: str) -> str:
        """The hash of what is in the file where a tensor belongs."""
        place, digest = self._places[name], xxhash.xxh3_128()
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.offset)
            left = place.size
            while left and (data := stream.read(min(left, 1 << 24))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()

    def finish(self) -> None:
        """Writes the index, if there are several files, and removes the journals. One process does this for all."""
        if self._split.is_sharded:
            weight_map = {name: place.file.name for name, place in sorted(self._places.items())}
            write_json(self.folder / INDEX_FILE, {"metadata": self._split.metadata, "weight_map": weight_map})
        for journal in self.folder.glob(f"{JOURNAL_FILE}*"):
            journal.unlink()


def _journal_of(rank: int | str) -> str:
    return f"{JOURNAL_FILE}.{rank}"


def _lock(stream: IO[bytes], offset: int, size: int) -> None:
    """Keeps a network file system from writing more of this process's cached pages than these bytes.

    Other processes may be writing the bytes before and after them in the same page. Closing the file ends the lock.
    """
    with suppress(OSError):  # a file system that is mounted without locks, such as Lustre, is coherent without them
        fcntl.lockf(stream, fcntl.LOCK_EX, size, offset)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's records, except for a line that a kill cut short."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
