"""A task's deltas, computed from its files and the base's when they are asked for."""

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.reading import Tensors
from lightning_drm.deltas.fingerprint import hash_pieces
from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.low_rank import densify, rows_of


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
        self._hashes: dict[tuple[str, ...], str] = {}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A parameter's value, or some rows of it."""
        wanted = (name, rows)
        if getattr(self._last, "wanted", None) != wanted:
            self._last.wanted = None
            self._last.value = precise(_rows(self._tensors.read(name), rows))
            self._last.wanted = wanted
        value: Tensor = self._last.value
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape."""
        return self._tensors.headers[name].shape

    def hash(self, *names: str, shape: tuple[int, ...]) -> str:
        """The hash of a parameter's stored value, which is computed once for all tasks.

        Args:
            names: Its name, or those of the tensors that make it up, in their order.
            shape: Its shape.
        """
        with self._lock:
            if names not in self._hashes:
                dtype = self._tensors.headers[names[0]].dtype
                self._hashes[names] = hash_pieces(shape, dtype, map(self._tensors.read, names))
            return self._hashes[names]


class FileDeltas(Mapping[str, Delta]):
    """One task's deltas, under the base's names.

    Args:
        task: The task, matched with the base.
        base: The base's values.
    """

    def __init__(self, task: PlannedTask, base: BaseValues) -> None:
        self._task = task
        self._base = base
        self._stacks = task.stacks
        self._last = threading.local()

    @override
    def __getitem__(self, name: str) -> Delta:
        return self.read(name)

    def read(self, name: str, rows: slice | None = None) -> Delta:
        """A parameter's delta, or some rows of it; only these are computed."""
        task = self._task
        raw = task.names[name]
        if name in task.stacked:
            return precise(self._stacked(name, rows)) - self._base.read(name, rows)
        found, part = self._found(raw), task.parts.get(name)
        self._check_base(name, raw, rows)
        if isinstance(found, LowRank) and name in task.transposed:
            found = found.T
        if part is not None:
            found = part.of(found)
        if isinstance(found, LowRank):
            return found if rows is None else rows_of(found, rows)
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

    def _stacked(self, name: str, rows: slice | None) -> Tensor:
        """The values of all experts, or of some, which the task has in tensors of their own; only these are read."""
        raws, shape = self._task.stacked[name], self._base.shape(name)
        each = len(raws) // shape[0]
        wanted = rows or slice(0, shape[0])
        found = [densify(self._task.input.read(raw)) for raw in raws[wanted.start * each : wanted.stop * each]]
        return torch.cat(found).view(-1, *shape[1:])

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
        names = self._stacks.get(raw, [name])
        if expected is not None and self._base.hash(*names, shape=self._task.input.entries[raw].shape) != expected:
            raise ValueError(
                f"{self._task.name}: its stored delta of {name} was taken from another value than this base's."
            )
        frozen = self._task.input.base_value(raw)
        if frozen is not None and name in self._task.parts:
            frozen = densify(self._task.parts[name].of(frozen))
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
