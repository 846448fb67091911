"""What every format of a finetune gives: what the finetune says of which parameter, under its own names.

A format is one subclass of `TaskInput` in a file of its own, and one line of the list in `readers.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lightning_drm.deltas import TaskStatistics
from lightning_drm.merging import Delta

Form = Literal["value", "delta", "low_rank", "low_rank_linear"]
"""A finetuned value, a dense delta, or a pair of factors; those of a linear layer are for a weight (out, in)."""


@dataclass(frozen=True)
class Entry:
    """What a finetune says of one parameter, from headers alone.

    Attributes:
        shape: The parameter's shape.
        dtype: Its precision in the file.
        form: Whether values or deltas are stored.
        rank: Inner dimension of the factors; 0 for dense entries.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form = "value"
    rank: int = 0


class TaskInput(ABC):
    """One finetune.

    Args:
        path: The file or folder.
        files: The files with its tensors.
        folder: The folder that its configuration and tokenizer would be in.

    Attributes:
        base_name: The base that it names, where it names one.
        base_hashes: By its own name, the hash of each base parameter, where they are stored.
        entries: What it holds, under its own names.
        head: Its head's tensors by name, where it keeps them apart.
        statistics: What was collected of its training data, under its own names, where it keeps that.
        ignored: What its files hold beside tensors and nobody reads: names of classes and functions.
    """

    format: ClassVar[str]
    """What it is, for people."""

    expected: ClassVar[str]
    """What a path in this format looks like, for the error about a path that is in no known format."""

    whole: ClassVar[bool] = False
    """Whether a parameter that is absent is missing, not unchanged."""

    def __init__(self, path: Path, files: Sequence[Path], folder: Path | None = None) -> None:
        self.path, self.files, self.folder = path, list(files), folder
        self.base_name: str | None = None
        self.base_hashes: Mapping[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self.head: Mapping[str, Tensor] = {}
        self.statistics: TaskStatistics | None = None
        self.ignored: set[str] = set()

    @classmethod
    @abstractmethod
    def opens(cls, path: Path) -> bool:
        """Whether a file or folder is in this format."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        """Reads the headers of a file or folder in this format.

        Args:
            path: The file or folder.
            task: The task's name, for a folder of several tasks.
            dequantize: Whether quantized weights may be read as floats.

        Raises:
            ValueError: If it is damaged, or has no exact delta.
        """

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
