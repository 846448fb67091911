"""A recipe laid over task vectors: the deltas of one parameter of all tasks in, its merged delta out.

`Fusion` goes through a recipe in three steps:

1. `Recipe.treatment` says for each parameter which method merges it, with which coefficients;
2. `calibrated_methods` shows whole task vectors to the methods that ask for them;
3. `TaskDeltas` reads the deltas of a parameter, and `merge_parameter` merges them.

Deltas are read when their turn comes and dropped afterwards. So no more than two parameters' deltas are on the device
at any time: those that are merged, and the next ones, which a thread reads ahead. Where entries are merged one by one,
or the experts of a layer are, and deltas can be read in part, a piece of a parameter takes the place of the whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from lightning_drm.deltas import TaskVector
from lightning_drm.fusion.calibration import calibrated_methods
from lightning_drm.fusion.decompositions import Decompositions
from lightning_drm.fusion.parameter import merge_parameter
from lightning_drm.fusion.pieces import pieces
from lightning_drm.fusion.recipe import Recipe
from lightning_drm.fusion.task_deltas import Piece, TaskDeltas
from lightning_drm.merging import Delta, LowRank, Method
from lightning_drm.merging.linalg.selection import Reduce, identity


@dataclass(frozen=True)
class Merged:
    """One merged parameter, or a piece of it.

    Attributes:
        name: The parameter's name.
        delta: Its merged delta, in the parameter's own shape.
        deltas: The tasks' deltas that it was merged from, in the order of the tasks.
        rows: The rows of the piece; ``None`` for all of the parameter.
    """

    name: str
    delta: Tensor
    deltas: Sequence[Delta]
    rows: slice | None = None


class Fusion:
    """The merged deltas of some task vectors under a recipe.

    Args:
        recipe: How to merge.
        vectors: The task vectors, at least one.
        device: Where to compute; deltas that are elsewhere are brought there one parameter at a time.
        transposed: Names of the matrices that are stored (in, out), whose parts are columns.
        shapes: By name, each parameter's shape, where it is known without asking for deltas.
        in_pieces: Names of the parameters that are merged a few rows at a time; `shapes` must have them.
        share: Names of the parameters that this rank merges, where several ranks share the work; all if left out.
        reduce: Sums a tensor over these ranks.
        decompositions: Keeps what later merges of the same task vectors can use again.

    Attributes:
        tasks: The tasks' names, in the order in which they are merged.
        kinds: By name, what each parameter is to its layer.
        treatments: By name, what is done to each parameter.

    Raises:
        ValueError: If task vectors come from different bases, disagree on a parameter's shape or kind, or the recipe
            does not fit them.

    Example:
        >>> vectors = [TaskVector(task, {"bias": torch.ones(2)}, {"bias": "other"}, {}, {}) for task in "ab"]
        >>> dict(Fusion(Recipe(coefficients={"a": 0.5}), vectors))
        {'bias': tensor([0.7500, 0.7500])}
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
        decompositions: Decompositions | None = None,
    ) -> None:
        recipe.check([vector.task for vector in vectors])
        self.device = torch.device(device)
        self.deltas = TaskDeltas(vectors, self.device)
        self.tasks, self.kinds = self.deltas.tasks, self.deltas.kinds
        self.treatments = {name: recipe.treatment(name, kind, self.tasks) for name, kind in self.kinds.items()}
        if recipe.overrides:
            known = shapes if shapes is not None else {name: self.deltas.shape(name) for name in self.kinds}
            if problems := recipe.problems(self.kinds, known):
                raise ValueError("\n".join(problems))
        self._transposed = transposed
        self._in_pieces = {name: shape for name, shape in (shapes or {}).items() if name in in_pieces}
        assert all(self.treatments[name].works_in_pieces for name in self._in_pieces), "some must be merged whole"
        self._share = share
        self._reduce = reduce
        self._decompositions = decompositions

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and merged delta, in the parameter's own shape, on the device."""
        return ((merged.name, merged.delta) for merged in self.merge(self.kinds))

    def calibrate(self) -> None:
        """Shows whole task vectors to the methods that ask for them. All ranks call it before any of them merges."""
        _ = self._methods

    def merge(self, names: Iterable[str]) -> Iterator[Merged]:
        """Merges whole parameters.

        Args:
            names: Which ones, in the order in which they are wanted; the next one is read ahead.

        Yields:
            Each parameter's merged delta, on the device: zeros for a parameter that keeps the base's value.
        """
        names = list(names)
        self.calibrate()
        for name, deltas in zip(names, self.deltas.stream((name, None) for name in names), strict=True):
            merged = self.merge_deltas(name, deltas)
            yield merged
            del merged, deltas  # before the next ones come, or a third parameter's would be in memory

    def comes_in_pieces(self, name: str) -> bool:
        """Whether a parameter is merged a few rows at a time."""
        return name in self._in_pieces

    def merge_in_pieces(self, name: str) -> Iterator[Merged]:
        """Merges a parameter that `comes_in_pieces`; after `calibrate`, several threads may do so at once.

        Args:
            name: Which parameter.

        Yields:
            Its merged pieces, in order.
        """
        for _, rows in self._pieces(name):
            yield self.merge_deltas(name, self.deltas.read(name, rows), rows)

    def merge_low_rank(self, names: Iterable[str], rank: int | None = None) -> Iterator[tuple[str, LowRank, float]]:
        """Merges parameters whose deltas are all low-rank, exactly and without a dense matrix.

        Args:
            names: Which parameters.
            rank: The largest rank that a result may have; whatever is exact if left out.

        Yields:
            Name, merged factors, and the relative error that the limit on the rank made (0.0 without one).
        """
        for name in names:
            method = self._methods[name]
            assert method is not None, "a parameter that keeps the base's value has no place in an adapter"
            try:
                merged = method.merge_low_rank(self.deltas.read(name), self.treatments[name].coefficients)
            except ValueError as refused:
                raise self.deltas.explained(refused, name) from refused
            limit = min(merged.rank if rank is None else rank, *merged.shape)
            factors, error = merged.truncate(limit) if merged.rank > limit else (merged, 0.0)
            yield name, factors, error

    def merge_deltas(self, name: str, deltas: Sequence[Delta], rows: slice | None = None) -> Merged:
        """Merges a parameter, or a piece of it, whose deltas have been read.

        Args:
            name: Which parameter.
            deltas: The tasks' deltas, in the order of `tasks`, on the device.
            rows: The rows of the piece; ``None`` for all of the parameter.
        """
        treatment, method = self.treatments[name], self._methods[name]
        if method is None:
            return Merged(name, torch.zeros(deltas[0].shape, device=self.device), deltas, rows)
        start = rows.start * prod(deltas[0].shape[1:]) if rows is not None else 0
        keyed = method.keyed([f"{task}/{name}" for task in self.tasks], start=start)
        try:
            merge = Method.merge if self._decompositions is None else self._decompositions.merging(name)
            merged = merge_parameter(keyed, deltas, treatment, transposed=name in self._transposed, merge=merge)
        except ValueError as error:
            raise self.deltas.explained(error, name) from error
        return Merged(name, merged, deltas, rows)

    @cached_property
    def _methods(self) -> dict[str, Method | None]:
        """Each parameter's method, calibrated with the other ranks."""
        own = [name for name in self.kinds if self._share is None or name in self._share]
        own_pieces = {name: self._pieces(name) for name in own}
        in_threads = bool(self._in_pieces)
        return calibrated_methods(self.treatments, own_pieces, self.deltas, self._reduce, in_threads=in_threads)

    def _pieces(self, name: str) -> list[Piece]:
        shape = self._in_pieces.get(name)
        return [(name, rows) for rows in (pieces(shape, self.device) if shape is not None else [None])]


def merge_side_by_side(fusions: Sequence[Fusion]) -> Iterator[tuple[str, list[Tensor]]]:
    """Merges the same task vectors by several recipes; each parameter's deltas are read once for all of them.

    Args:
        fusions: One for each recipe, of the same task vectors on the same device.

    Yields:
        Each parameter's name, and its merged deltas, one for each fusion.
    """
    for fusion in fusions:
        fusion.calibrate()
    first = fusions[0]
    names = list(first.kinds)
    for name, deltas in zip(names, first.deltas.stream((name, None) for name in names), strict=True):
        yield name, [fusion.merge_deltas(name, deltas).delta for fusion in fusions]
        del deltas  # before the next ones come
