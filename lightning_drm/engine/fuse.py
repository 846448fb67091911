"""Laying a recipe over task vectors: one parameter of all tasks at a time, its merged delta out.

Deltas are read when their turn comes and dropped after, so at no time are more than two parameters' deltas on the
device: the one that is merged, and the next, which a thread reads ahead. Tasks are taken in the order of their names,
whatever order they came in, so that rounding, too, is the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_drm.deltas import Kind, TaskVector, describe_difference
from lightning_drm.engine.read_ahead import read_ahead
from lightning_drm.engine.recipe import Recipe, Treatment, split_sizes
from lightning_drm.merging import Delta, LowRank, Method
from lightning_drm.merging.selection import Reduce, identity


@dataclass(frozen=True)
class Merged:
    """One merged parameter.

    Attributes:
        name: Its name.
        delta: Its merged delta, in the parameter's own shape.
        parts: The tasks' deltas that it was merged from.
    """

    name: str
    delta: Tensor
    parts: Sequence[Delta]


class Fusion:
    """The merged deltas of some task vectors under a recipe.

    Args:
        recipe: What to do.
        vectors: The task vectors, at least one.
        device: Where to compute; deltas that are elsewhere are brought there one parameter at a time.
        transposed: Names of matrices stored ``(in, out)``, which are split along their columns.
        shapes: Shape of each parameter by name, where they are known without asking for deltas.
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
        calibrated = self._calibrated
        for name, deltas in zip(names, self._stream(names), strict=True):
            method = calibrated.get(name)
            if method is None:
                yield Merged(name, torch.zeros(deltas[0].shape, device=self.device), deltas)
            else:
                keyed = method.keyed([f"{task}/{name}" for task in self.tasks])
                merged = _merge_in_shape(keyed, deltas, self.treatments[name], name in self.transposed)
                yield Merged(name, merged, deltas)
                del merged
            del deltas  # before the next ones come, or a third parameter's would be in memory

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
            ready = method.calibrate(partial(self._stream, own), reduce=self.reduce, num_tasks=len(self.tasks))
            methods.update(dict.fromkeys(names, ready))
        return methods

    def _first(self, name: str) -> Delta:
        return next(vector.deltas[name] for vector in self.vectors if name in vector.deltas)

    def _stream(self, names: Sequence[str]) -> Iterator[list[Delta]]:
        return read_ahead(map(self._deltas, names))

    def _deltas(self, name: str) -> list[Delta]:
        deltas = [vector.deltas.get(name) for vector in self.vectors]
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
        pieces = [LowRank(d.up[part], d.down) if isinstance(d, LowRank) else d[part] for d in rows]
        merged.append(method.merge([p.T if transposed else p for p in pieces], treatment.coefficients))
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
