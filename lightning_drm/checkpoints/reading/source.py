"""One finetune as it was found: what it says of which parameter, under its own names."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.tensors import Tensors, plain_name
from lightning_drm.deltas import StoredDeltas
from lightning_drm.merging import Delta, LowRank

Form = Literal["value", "delta", "low_rank", "low_rank_linear"]
"""A finetuned value, a dense delta, or a pair of factors; those of a linear layer are for a weight (out, in)."""


@dataclass(frozen=True)
class Entry:
    """What a finetune says of one parameter, from headers alone.

    Attributes:
        shape: The parameter's shape.
        dtype: Precision in the file.
        form: Whether values or deltas are stored.
        rank: Inner dimension of the factors; 0 for dense entries.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form = "value"
    rank: int = 0


class TaskInput(ABC):
    """One finetune.

    Attributes:
        path: Where it is.
        files: The files with its tensors.
        folder: Where its configuration and tokenizer would be.
        base_name: The base that it names, where it does.
        base_hashes: Hash by its own name of every base parameter, where they are stored.
        entries: What it holds, under its own names.
        head: Its head's tensors by name, where it keeps them apart.
    """

    format: ClassVar[str]
    """What it is, for people."""

    whole: ClassVar[bool] = False
    """Whether a parameter that is absent is missing, not unchanged."""

    def __init__(self, path: Path, files: Sequence[Path], folder: Path | None = None) -> None:
        self.path, self.files, self.folder = path, list(files), folder
        self.base_name: str | None = None
        self.base_hashes: Mapping[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self.head: Mapping[str, Tensor] = {}

    @property
    def is_mapped(self) -> bool:
        """Whether `read` costs next to nothing until values are looked at, and then only for those."""
        return False

    @abstractmethod
    def read(self, name: str) -> Delta:
        """A parameter's value or delta, as the entry's form says."""

    def base_value(self, name: str) -> Tensor | None:
        """The value that a parameter had before the finetune, where it is kept beside the delta."""
        return None


class WeightsInput(TaskInput):
    """Finetuned values: a model folder or a checkpoint.

    Args:
        path: Where they are.
        tensors: The values.
        folder: The model's folder, if it is one.
    """

    format = "weights"
    whole = True

    def __init__(self, path: Path, tensors: Tensors, folder: Path | None = None) -> None:
        super().__init__(path, tensors.files, folder)
        self._raw = {plain_name(name): name for name in tensors.headers}
        self._tensors = tensors
        for name, raw in self._raw.items():
            header = tensors.headers[raw]
            if header.dtype.is_floating_point:
                self.entries[name] = Entry(header.shape, header.dtype)

    @property
    @override
    def is_mapped(self) -> bool:
        return self._tensors.is_mapped

    @override
    def read(self, name: str) -> Delta:
        return self._tensors.read(self._raw[name])


class StoredInput(TaskInput):
    """The deltas that a run folder keeps of one task.

    Args:
        path: The task's folder.
        deltas: Its deltas.
        head: Its head.
        base_hashes: Hash by name of the base's parameters.
    """

    format = "stored deltas"

    def __init__(
        self, path: Path, deltas: StoredDeltas, head: Mapping[str, Tensor], base_hashes: Mapping[str, str]
    ) -> None:
        super().__init__(path, [deltas.path])
        self.head, self.base_hashes, self._deltas = head, base_hashes, deltas
        for name in deltas:
            delta = deltas[name]  # mapped, not read
            rank = delta.rank if isinstance(delta, LowRank) else 0
            form: Form = "low_rank" if isinstance(delta, LowRank) else "delta"
            self.entries[name] = Entry(tuple(delta.shape), delta.dtype, form, rank)

    @property
    @override
    def is_mapped(self) -> bool:
        return True

    @override
    def read(self, name: str) -> Delta:
        return self._deltas[name]
