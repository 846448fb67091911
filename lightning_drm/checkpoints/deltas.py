"""A task's deltas, computed from its files and the base's when they are asked for."""

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.reading import Tensors
from lightning_drm.deltas import hash_tensor
from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.low_rank import rows_of


class BaseValues:
    """The base's values in float32, or float64 where the files have that.

    Each thread keeps the values that it read last, since all tasks ask for them in turn.

    Args:
        tensors: The base's tensors.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._last = threading.local()
        self._lock = threading.Lock()
        self._hashes: dict[str, str] = {}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A parameter's value, or some rows of it."""
        wanted = (name, rows)
        if getattr(self._last, "wanted", None) != wanted:
            self._last.wanted = None
            self._last.value = precise(_rows(self._tensors.read(name), rows))
            self._last.wanted = wanted
        value: Tensor = self._last.value
        return value

    def hash(self, name: str) -> str:
        """The hash of a parameter's stored value, which is computed once for all tasks."""
        with self._lock:
            if name not in self._hashes:
                self._hashes[name] = hash_tensor(self._tensors.read(name))
            return self._hashes[name]


class FileDeltas(Mapping[str, Delta]):
    """One task's deltas, under the base's names.

    Args:
        task: The task, matched with the base.
        base: The base's values.
    """

    def __init__(self, task: PlannedTask, base: BaseValues) -> None:
        self._task = task
        self._base = base
        self._last = threading.local()

    @override
    def __getitem__(self, name: str) -> Delta:
        return self.read(name)

    def read(self, name: str, rows: slice | None = None) -> Delta:
        """A parameter's delta, or some rows of it; only these are computed."""
        task = self._task
        raw = task.names[name]
        found = self._found(raw)
        self._check_base(name, raw, rows)
        if isinstance(found, LowRank):
            turned = found.T if name in task.transposed else found
            return turned if rows is None else rows_of(turned, rows)
        if task.input.entries[raw].form == "delta":
            return precise(_rows(found, rows))
        base = self._base.read(name, rows)
        sources = task.rows.get(name)
        if sources is None:
            return precise(_rows(found, rows)) - base
        sources = _rows(sources, rows)
        delta = torch.zeros_like(base)
        known = sources >= 0
        delta[known] = precise(found[sources[known]]) - base[known]
        return delta

    def _found(self, raw: str) -> Delta:
        """What the finetune says of a parameter; a computed delta is kept for the next pieces."""
        if self._task.input.entries[raw].form == "value":
            return self._task.input.read(raw)
        if getattr(self._last, "raw", None) != raw:
            self._last.raw = None
            self._last.found = self._task.input.read(raw)
            self._last.raw = raw
        found: Delta = self._last.found
        return found

    def _check_base(self, name: str, raw: str, rows: slice | None) -> None:
        expected = self._task.input.base_hashes.get(raw)
        if expected is not None and self._base.hash(name) != expected:
            raise ValueError(
                f"{self._task.name}: its stored delta of {name} was taken from another value than this base's."
            )
        frozen = self._task.input.base_value(raw)
        if frozen is not None and not torch.equal(precise(_rows(frozen, rows)), self._base.read(name, rows)):
            raise ValueError(f"{self._task.name}: its adapter was trained on another value of {name} than this base's.")

    @override
    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the delta
        return name in self._task.names

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._task.names)

    @override
    def __len__(self) -> int:
        return len(self._task.names)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
