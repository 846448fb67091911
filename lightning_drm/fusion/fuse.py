"""A recipe laid over task vectors: the deltas of one parameter of all tasks in, its merged delta out.

`Fusion` goes through a recipe in these steps:

1. `Recipe.treatment` says for each parameter which method merges it, with which coefficients;
2. `calibrated_methods` shows whole task vectors to the methods that ask for them;
3. `TaskDeltas` reads the deltas of a parameter, and `merge_parameter` merges them;
4. LiNeS, if it is around the method, scales what was merged. To find its alpha, all parameters are merged twice: once
   to see how large they become, which keeps nothing of them, and once for good.

Deltas are read when their turn comes and dropped afterwards. So no more than two parameters' deltas are on the device
at any time: those that are merged, and the next ones, which a thread reads ahead. Where entries are merged one by one,
or the experts of a layer are, and deltas can be read in part, a piece of a parameter takes the place of the whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from lightning_drm.deltas import TaskVector
from lightning_drm.fusion.blocks import block_of, depths
from lightning_drm.fusion.calibration import calibrated_methods
from lightning_drm.fusion.decompositions import Decompositions
from lightning_drm.fusion.depth import problems_of_depth
from lightning_drm.fusion.known import problem_of_statistics, treatments
from lightning_drm.fusion.model_norms import norms, over_model
from lightning_drm.fusion.parameter import merge_parameter
from lightning_drm.fusion.pieces import pieces
from lightning_drm.fusion.recipe import Recipe
from lightning_drm.fusion.task_deltas import Piece, TaskDeltas
from lightning_drm.fusion.threads import num_threads, side_by_side
from lightning_drm.merging import Delta, LiNeS, LowRank, Method, Statistics
from lightning_drm.merging.inputs import check_result
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
        shapes: By name, each parameter's shape, where it is known without asking for deltas. Others than those that are
            merged may be among them: LiNeS counts their blocks, too.
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
        if problem := problem_of_statistics(recipe.method, vectors):
            raise ValueError(problem)
        self.treatments = treatments(recipe, self.kinds, self.tasks, vectors)
        if recipe.overrides:
            own_shapes = shapes if shapes is not None else {name: self.deltas.shape(name) for name in self.kinds}
            if problems := recipe.problems(self.kinds, own_shapes, transposed):
                raise ValueError("\n".join(problems))
        names = {**dict.fromkeys(shapes or ()), **dict.fromkeys(vectors[0].base_hashes), **dict.fromkeys(self.kinds)}
        if problems := problems_of_depth(recipe.method, names):
            raise ValueError("\n".join(problems))
        self._depths = depths(names)
        self._recipe = recipe
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
        _ = self._methods, self.lines

    def merge(self, names: Iterable[str]) -> Iterator[Merged]:
        """Merges whole parameters.

        Args:
            names: Which ones, in the order in which they are wanted; the next one is read ahead.

        Yields:
            Each parameter's merged delta, on the device: zeros for a parameter that keeps the base's value.
        """
        self.calibrate()
        for merged in self._unscaled(list(names)):
            yield self._scaled(merged)
            del merged  # before the next one comes, or a third parameter's deltas would be in memory

    @property
    def in_pieces(self) -> frozenset[str]:
        """Names of the parameters that are merged a few rows at a time."""
        return frozenset(self._in_pieces)

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
        for merged in self._unscaled_pieces(name):
            yield self._scaled(merged)
            del merged  # before the next one comes

    def merge_low_rank(self, names: Iterable[str], rank: int | None = None) -> Iterator[tuple[str, LowRank, float]]:
        """Merges parameters whose deltas are all low-rank, exactly and without a dense matrix.

        Args:
            names: Which parameters.
            rank: The largest rank that a result may have; whatever is exact if left out.

        Yields:
            Name, merged factors, and the relative error that the limit on the rank made (0.0 without one).
        """
        self.calibrate()
        for name in names:
            method = self._methods[name]
            assert method is not None, "a parameter that keeps the base's value has no place in an adapter"
            turned = method.acts_on_inputs and name in self._transposed
            deltas = self.deltas.read(name)
            try:
                keyed = method.informed(self._statistics(method, name)).keyed(self._keys(name))
                merged = keyed.merge_low_rank(
                    [delta.T for delta in deltas] if turned else deltas, self.treatments[name].coefficients
                )
            except ValueError as refused:
                raise self.deltas.explained(refused, name) from refused
            merged = merged.T if turned else merged
            limit = min(merged.rank if rank is None else rank, *merged.shape)
            factors, error = merged.truncate(limit) if merged.rank > limit else (merged, 0.0)
            if self.lines is not None:
                factors = self.lines.scaled(factors, self._depth(name))
            if factors.rank == 0:  # no task changed it; peft has no adapters without directions
                rows, columns = factors.shape
                factors = LowRank(factors.up.new_zeros(rows, 1), factors.down.new_zeros(1, columns))
            yield name, factors, error

    def merge_deltas(self, name: str, deltas: Sequence[Delta], rows: slice | None = None) -> Merged:
        """Merges a parameter, or a piece of it, whose deltas have been read.

        Args:
            name: Which parameter.
            deltas: The tasks' deltas, in the order of `tasks`, on the device.
            rows: The rows of the piece; ``None`` for all of the parameter.
        """
        return self._scaled(self._merge_unscaled(name, deltas, rows))

    @cached_property
    def lines(self) -> LiNeS | None:
        """LiNeS with the numbers that it has for these task vectors, found with the other ranks; None without it."""
        method = self._recipe.method
        if not isinstance(method, LiNeS):
            return None
        if method.alpha != "auto":
            return method.of_model(len(self.tasks))
        known = self._decompositions.norms if self._decompositions is not None else {}
        unscaled = repr(replace(self._recipe, method=method.method))
        if unscaled not in known:
            known[unscaled] = self._norms()
        return method.of_model(len(self.tasks), known[unscaled])

    @property
    def notes(self) -> list[str]:
        """What was found of the task vectors that the recipe does not say, after `calibrate`."""
        if self.lines is None:
            return []
        return [f"LiNeS: alpha is {self.lines.alpha:.4g}, beta is {self.lines.beta:.4g}."]

    def _merge_unscaled(self, name: str, deltas: Sequence[Delta], rows: slice | None) -> Merged:
        treatment, method = self.treatments[name], self._methods[name]
        if method is None:
            return Merged(name, torch.zeros(deltas[0].shape, device=self.device), deltas, rows)
        try:
            merged = merge_parameter(
                method,
                deltas,
                treatment,
                keys=self._keys(name),
                start=rows.start * prod(deltas[0].shape[1:]) if rows is not None else 0,
                transposed=name in self._transposed,
                statistics=self._statistics(method, name, rows),
                merge=Method.merge if self._decompositions is None else self._decompositions.merging(name),
            )
        except ValueError as error:
            raise self.deltas.explained(error, name) from error
        return Merged(name, merged, deltas, rows)

    def _statistics(self, method: Method, name: str, rows: slice | None = None) -> list[Statistics]:
        return [] if method.needs is None else self.deltas.statistics(name, method.needs, rows)

    def _unscaled(self, names: Sequence[str]) -> Iterator[Merged]:
        """What the method makes of whole parameters; the next one is read ahead."""
        for name, deltas in zip(names, self.deltas.stream((name, None) for name in names), strict=True):
            merged = self._merge_unscaled(name, deltas, None)
            yield merged
            del merged, deltas  # before the next ones come

    def _unscaled_pieces(self, name: str) -> Iterator[Merged]:
        for _, rows in self._pieces(name):
            yield self._merge_unscaled(name, self.deltas.read(name, rows), rows)

    def _scaled(self, merged: Merged) -> Merged:
        """LiNeS' step, if it is around the method."""
        if self.lines is None:
            return merged
        delta = self.lines.scaled(merged.delta, self._depth(merged.name))
        try:
            check_result("LiNeS", delta, merged.deltas)
        except ValueError as error:
            raise self.deltas.explained(error, merged.name) from error
        return replace(merged, delta=delta)

    def _depth(self, name: str) -> float | None:
        return self._depths.get(block_of(name))

    def _norms(self) -> tuple[float, float]:
        """The norms of the whole model, for which this rank merges its share and keeps nothing of it."""
        names = [name for name, method in self._methods.items() if method is not None]
        own = [name for name in names if self._share is None or name in self._share]

        def of(merged: Merged) -> Tensor:
            return norms(merged.deltas, self.treatments[merged.name].coefficients, merged.delta)

        def of_pieces(name: str) -> tuple[str, Tensor]:
            return name, torch.stack([of(merged) for merged in self._unscaled_pieces(name)]).sum(0)

        in_pieces = [name for name in own if self.comes_in_pieces(name)]
        found = dict(side_by_side(of_pieces, in_pieces, num_threads(self.device)))
        for merged in self._unscaled([name for name in own if not self.comes_in_pieces(name)]):
            found[merged.name] = of(merged)
            del merged  # before the next one comes
        return over_model(found, names, self._reduce)

    @cached_property
    def _methods(self) -> dict[str, Method | None]:
        """Each parameter's method, calibrated with the other ranks."""
        own = [name for name in self.kinds if self._share is None or name in self._share]
        own_pieces = {name: self._pieces(name) for name in own}
        return calibrated_methods(
            self.treatments,
            own_pieces,
            self.deltas,
            self._reduce,
            in_threads=bool(self._in_pieces),
            transposed=self._transposed,
            decompositions=self._decompositions,
        )

    def _keys(self, name: str) -> list[str]:
        """What random draws for a parameter are tied to, one name for each task."""
        return [f"{task}/{name}" for task in self.tasks]

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
