"""Laying a recipe over task vectors: one parameter of all tasks at a time, its merged delta out.

Deltas are read when their turn comes and dropped after, so at no time are more than two parameters' deltas on the
device: the one that is merged, and the next, which a thread reads ahead. Where entries are merged one by one and deltas
can be read in part, it is a piece of a parameter. Tasks are taken in the order of their names, whatever order they came
in, so that rounding, too, is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import starmap
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_drm.deltas import Kind, TaskVector, describe_difference
from lightning_drm.fusion.pieces import num_threads, pieces, together
from lightning_drm.fusion.read_ahead import read_ahead
from lightning_drm.fusion.recipe import Recipe, Treatment, split_sizes
from lightning_drm.merging import Delta, LowRank, Method
from lightning_drm.merging.inputs import check_deltas
from lightning_drm.merging.linalg.selection import Reduce, identity
from lightning_drm.merging.low_rank import rows_of

Part: TypeAlias = tuple[str, slice | None]
"""A parameter's name and the rows that are meant; ``None`` for all of them."""


@dataclass(frozen=True)
class Merged:
    """One merged parameter, or some rows of it.

    Attributes:
        name: Its name.
        delta: Its merged delta, in the parameter's own shape.
        parts: The tasks' deltas that it was merged from.
        rows: Which rows these are; ``None`` for all of a parameter.
    """

    name: str
    delta: Tensor
    parts: Sequence[Delta]
    rows: slice | None = None


class Fusion:
    """The merged deltas of some task vectors under a recipe.

    Args:
        recipe: What to do.
        vectors: The task vectors, at least one.
        device: Where to compute; deltas that are elsewhere are brought there one parameter at a time.
        transposed: Names of matrices stored ``(in, out)``, which are split along their columns.
        shapes: Shape of each parameter by name, where they are known without asking for deltas.
        in_pieces: Names of the parameters that are merged a few rows at a time, of which no more need be read; their
            shapes must be given.
        share: Names of the parameters that this rank merges, where several ranks share them; all if left out.
        reduce: Sums a tensor over these ranks.

    Raises:
        ValueError: If task vectors come from different bases, disagree on a parameter's shape or kind, or the recipe
            does not fit to them.
    """

    def __init__(
        self,
        recipe: Recipe,
        vectors: Sequence[TaskVector],
        device: torch.device | str = "cpu",
        *,
        transposed: Set[str] = frozenset(),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        in_pieces: Set[str] = frozenset(),
        share: Set[str] | None = None,
        reduce: Reduce = identity,
    ) -> None:
        self.vectors = sorted(vectors, key=lambda vector: vector.task)
        self.tasks = [vector.task for vector in self.vectors]
        recipe.check([vector.task for vector in vectors])
        self.recipe = recipe
        self.device = torch.device(device)
        self.transposed = transposed
        self.share = share
        self.reduce = reduce
        self.kinds = _agreed_kinds(self.vectors)
        self.treatments = {name: recipe.treatment(name, kind, self.tasks) for name, kind in self.kinds.items()}
        self._in_pieces = {name: shape for name, shape in (shapes or {}).items() if name in in_pieces}
        assert all(self.treatments[name].works_in_pieces for name in self._in_pieces), "some must be merged whole"
        if recipe.overrides and shapes is None:
            shapes = {name: tuple(self._first(name).shape) for name in self.kinds}
        if recipe.overrides and shapes is not None and (problems := recipe.problems(self.kinds, shapes)):
            raise ValueError("\n".join(problems))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and merged delta of each parameter, in the parameter's own shape, on the device."""
        return ((merged.name, merged.delta) for merged in self.merge(self.kinds))

    def merge(self, names: Iterable[str]) -> Iterator[Merged]:
        """Merges some parameters.

        Args:
            names: Which, in the order they are wanted; they may be read ahead of that.

        Yields:
            Each parameter's merged delta, on the device. A parameter that keeps the base's value has a delta of 0.
        """
        names = list(names)
        self.calibrate()
        for name, deltas in zip(names, self._stream((name, None) for name in names), strict=True):
            merged = self._merge(name, deltas, None)
            yield merged
            del merged, deltas  # before the next ones come, or a third parameter's would be in memory

    def comes_in_pieces(self, name: str) -> bool:
        """Whether a parameter is merged a few rows at a time."""
        return name in self._in_pieces

    def merge_in_pieces(self, name: str) -> Iterator[Merged]:
        """Merges a parameter that `comes_in_pieces`; several threads may do so at once after `calibrate`.

        Args:
            name: Which.

        Yields:
            Its pieces in order.
        """
        for rows in self._pieces(name):
            yield self._merge(name, self._deltas(name, rows), rows)

    def calibrate(self) -> None:
        """Shows whole task vectors to the methods that need to see them first; on all ranks, before any merges."""
        _ = self._calibrated

    def _merge(self, name: str, deltas: Sequence[Delta], rows: slice | None) -> Merged:
        treatment, method = self.treatments[name], self._calibrated[name]
        if method is None:
            return Merged(name, torch.zeros(deltas[0].shape, device=self.device), deltas, rows)
        start = rows.start * prod(deltas[0].shape[1:]) if rows is not None else 0
        keyed = method.keyed([f"{task}/{name}" for task in self.tasks], start=start)
        try:
            merged = _merge_in_shape(keyed, deltas, treatment, name in self.transposed)
        except ValueError as error:
            raise ValueError(self._explained(error, name)) from error
        return Merged(name, merged, deltas, rows)

    def _explained(self, error: ValueError, name: str) -> str:
        """A method's complaint, which counts tasks, with the names of what it is about."""
        tasks = ", ".join(f"{index} is {task}" for index, task in enumerate(self.tasks))
        return f"{name}: {error} (task {tasks})."

    def merge_low_rank(self, names: Iterable[str], rank: int | None = None) -> Iterator[tuple[str, LowRank, float]]:
        """Merges parameters whose deltas are all low-rank, exactly, without a dense matrix.

        Args:
            names: Which.
            rank: Largest rank of a result; as high as it is if left out.

        Yields:
            Name, merged factors, and the relative error that the limit on the rank made (0.0 without one).
        """
        calibrated = self._calibrated
        for name in names:
            method = calibrated[name]
            assert method is not None, "parameters that keep the base's value have no place in an adapter"
            merged = method.merge_low_rank(self._deltas(name), self.treatments[name].coefficients)
            limit = min(merged.rank if rank is None else rank, *merged.shape)
            factors, error = merged.truncate(limit) if merged.rank > limit else (merged, 0.0)
            yield name, factors, error

    @cached_property
    def _calibrated(self) -> dict[str, Method | None]:
        """Each parameter's method; those that need to see a whole task vector first have seen it, on all ranks."""
        groups: dict[Method, list[str]] = {}
        for name, treatment in self.treatments.items():
            if treatment.rule == "method" and treatment.method is not None:
                groups.setdefault(treatment.method, []).append(name)
        methods = {name: treatment.method for name, treatment in self.treatments.items()}
        for method, names in groups.items():
            own = [name for name in names if self.share is None or name in self.share]
            parts = [(name, rows) for name in own for rows in self._pieces(name)]
            try:
                ready = self._calibrate(method, parts)
            except ValueError:
                self._refuse_first(method, parts)
                raise
            methods.update(dict.fromkeys(names, ready))
        return methods

    def _calibrate(self, method: Method, parts: Sequence[Part]) -> Method:
        num_tasks = len(self.tasks)
        if not (self._in_pieces and method.works_in_pieces):  # whole parameters: one at a time, and the next
            return method.calibrate(partial(self._stream, parts), reduce=self.reduce, num_tasks=num_tasks)

        def calibrate(share: Callable[[], Iterator[Part]], reduce: Reduce) -> Method:
            stream = partial(starmap, self._deltas)
            return method.calibrate(lambda: stream(share()), reduce=reduce, num_tasks=num_tasks)

        return together(calibrate, parts, self.reduce, num_threads(self.device))

    def _refuse_first(self, method: Method, parts: Sequence[Part]) -> None:
        """Refuses the first deltas that a method cannot take, by name: a calibration sees them in any order."""
        for (name, _), deltas in zip(parts, self._stream(parts), strict=True):
            try:
                check_deltas(type(method).__name__, deltas, matrices=not method.elementwise)
            except ValueError as error:
                raise ValueError(self._explained(error, name)) from error

    def _first(self, name: str) -> Delta:
        return next(vector.deltas[name] for vector in self.vectors if name in vector.deltas)

    def _pieces(self, name: str) -> list[slice | None]:
        return pieces(self._in_pieces[name], self.device) if self.comes_in_pieces(name) else [None]

    def _stream(self, parts: Iterable[Part]) -> Iterator[list[Delta]]:
        return read_ahead(self._deltas(name, rows) for name, rows in parts)

    def _deltas(self, name: str, rows: slice | None = None) -> list[Delta]:
        deltas = [vector.read(name, rows) for vector in self.vectors]
        present = [delta for delta in deltas if delta is not None]
        shapes = {tuple(delta.shape) for delta in present}
        if len(shapes) > 1:
            found = ", ".join(
                f"{v.task} {tuple(d.shape)}" for v, d in zip(self.vectors, deltas, strict=True) if d is not None
            )
            raise ValueError(f"{name}: the tasks' deltas have different shapes: {found}.")
        return [delta.to(self.device) if delta is not None else self._zero_like(present[0]) for delta in deltas]

    def _zero_like(self, delta: Delta) -> Delta:
        if isinstance(delta, LowRank):
            rows, columns = delta.shape
            up = torch.zeros(rows, 0, dtype=delta.up.dtype, device=self.device)
            return LowRank(up, torch.zeros(0, columns, dtype=delta.down.dtype, device=self.device))
        return torch.zeros(delta.shape, dtype=delta.dtype, device=self.device)


def _merge_in_shape(method: Method, deltas: Sequence[Delta], treatment: Treatment, transposed: bool) -> Tensor:
    """Merges, seeing a convolution's ``(out, in, k, k)`` as ``(out, in·k·k)`` where the method wants matrices."""
    first = deltas[0]
    if treatment.split is not None:
        return _merge_in_parts(method, deltas, treatment, transposed)
    if method.elementwise or len(first.shape) == 2:
        return method.merge(deltas, treatment.coefficients)
    matrices = [delta.flatten(1) for delta in deltas if isinstance(delta, Tensor)]
    return method.merge(matrices, treatment.coefficients).reshape(first.shape)


def _merge_in_parts(method: Method, deltas: Sequence[Delta], treatment: Treatment, transposed: bool) -> Tensor:
    """Merges the parts of a fused matrix one by one."""
    assert treatment.split is not None
    rows = [delta.T if transposed else delta for delta in deltas]
    merged, start = [], 0
    for size in split_sizes(treatment.split, rows[0].shape[0]):
        part = slice(start, start + size)
        blocks = [rows_of(delta, part) for delta in rows]
        merged.append(method.merge([b.T if transposed else b for b in blocks], treatment.coefficients))
        start += size
    return torch.cat(merged, dim=1 if transposed else 0)


def _agreed_kinds(vectors: Sequence[TaskVector]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for vector in vectors:
        if vector.base_hashes != vectors[0].base_hashes:
            difference = describe_difference(vectors[0].base_hashes, vector.base_hashes)
            raise ValueError(
                f"Tasks {vectors[0].task!r} and {vector.task!r} were finetuned from different bases: {difference}."
            )
        for name in vector.deltas:
            if kinds.setdefault(name, vector.kinds[name]) != vector.kinds[name]:
                raise ValueError(
                    f"{name} is a {kinds[name]} in one task and a {vector.kinds[name]} in {vector.task!r}."
                )
    return kinds
