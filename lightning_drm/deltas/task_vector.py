"""A task vector: all deltas of one task, its head, and where they come from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from lightning_drm.deltas.kinds import Kind
from lightning_drm.deltas.statistics import TaskStatistics
from lightning_drm.merging import Delta
from lightning_drm.merging.low_rank import rows_of


@runtime_checkable
class ReadsRows(Protocol):
    """Deltas by name that give some rows of one without computing the others."""

    def read(self, name: str, rows: slice | None = None) -> Delta:
        """A delta, or some rows of it."""


@dataclass(frozen=True)
class TaskVector:
    """What one finetune added to the base.

    Attributes:
        task: The task's name.
        deltas: Delta by parameter name; dense ones in float32 (or float64), LoRA ones as `LowRank`. A parameter that
            the task did not train is absent. The mapping may read from disk, one delta at a time.
        kinds: What each parameter in ``deltas`` is to its layer.
        head: The head's tensors by name.
        base_hashes: Hash by name of every backbone parameter that the task started from.
        settings: Hyper-parameters of the finetune, as they should be shown and compared.
        num_steps: How many optimizer steps it took, where that is known.
        statistics: What was collected of the task's data, if anything was.
    """

    task: str
    deltas: Mapping[str, Delta]
    kinds: Mapping[str, Kind]
    head: Mapping[str, Tensor]
    base_hashes: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)
    num_steps: int | None = None
    statistics: TaskStatistics | None = None

    def of(self, names: Collection[str]) -> Self:
        """The same of some parameters alone."""
        own = [name for name in names if name in self.deltas]
        return replace(self, deltas={n: self.deltas[n] for n in own}, kinds={n: self.kinds[n] for n in own})

    def read(self, name: str, rows: slice | None = None) -> Delta | None:
        """A parameter's delta, or some rows of it; ``None`` if the task did not train it."""
        if name not in self.deltas:
            return None
        if rows is None:
            return self.deltas[name]
        if isinstance(self.deltas, ReadsRows):
            return self.deltas.read(name, rows)
        return rows_of(self.deltas[name], rows)
