"""A task's deltas, computed from files when they are asked for."""

from collections.abc import Iterator, Mapping
from threading import Lock

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.deltas import hash_tensor
from lightning_drm.engine.inputs import Tensors
from lightning_drm.engine.planned_task import PlannedTask
from lightning_drm.merging import Delta, LowRank


class BaseValues:
    """The base's values in float32 (or better), the last one kept, since all tasks ask for it in turn.

    Args:
        tensors: The base's files.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._lock = Lock()
        self._last: tuple[str, Tensor] | None = None
        self._hashes: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, precise(self._tensors.read(name)))
            return self._last[1]

    def hash(self, name: str) -> str:
        """The hash of a parameter's stored value, read only once for all tasks."""
        with self._lock:
            if name not in self._hashes:
                self._hashes[name] = hash_tensor(self._tensors.read(name))
            return self._hashes[name]


class FileDeltas(Mapping[str, Delta]):
    """One task's deltas by the base's names.

    Args:
        task: What the plan found out about the task.
        base: The base's values.
    """

    def __init__(self, task: PlannedTask, base: BaseValues) -> None:
        self._task = task
        self._base = base

    @override
    def __getitem__(self, name: str) -> Delta:
        task = self._task
        raw = task.names[name]
        found = task.input.read(raw)
        self._check_base(name, raw)
        if isinstance(found, LowRank):
            return found.T if name in task.transposed else found
        if task.input.entries[raw].form == "delta":
            return precise(found)
        base = self._base[name]
        rows = task.rows.get(name)
        if rows is None:
            return precise(found) - base
        delta = torch.zeros_like(base)
        known = rows >= 0
        delta[known] = precise(found)[rows[known]] - base[known]
        return delta

    def _check_base(self, name: str, raw: str) -> None:
        expected = self._task.input.base_hashes.get(raw)
        if expected is not None and self._base.hash(name) != expected:
            raise ValueError(f"{self._task.name}: {name} is not the base's value that the stored delta was taken from.")
        frozen = self._task.input.base_value(raw)
        if frozen is not None and not torch.equal(precise(frozen), self._base[name]):
            raise ValueError(f"{self._task.name}: {name} is not the base's value that its adapter was trained on.")

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._task.names)

    @override
    def __len__(self) -> int:
        return len(self._task.names)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
