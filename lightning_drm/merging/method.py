"""What every merging method is: a few parameters, and a function from N deltas of one parameter to one."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from lightning_drm.merging.inputs import check_coefficients, check_deltas, check_result
from lightning_drm.merging.linalg.selection import Reduce, identity
from lightning_drm.merging.low_rank import Delta, LowRank, densify
from lightning_drm.merging.precision import ieee_arithmetic
from lightning_drm.merging.statistics import Need, Statistics, check_statistics

COST_PER_VALUE = 500.0
"""What reading, moving and comparing one value of one task costs, in the unit of `Method.cost`: about 10 ns."""

PIECE_STEP = 2
"""Pieces of a parameter start at a multiple of this many entries, since random numbers are drawn so many at a time."""


class Method(ABC):
    """Base of all merging methods: from deltas D_1, …, D_N and coefficients λ_1, …, λ_N, one merged delta D.

    A subclass takes its parameters in `__init__`, keeps each under its own name, and implements `_merge`. If it is
    exact on factors, it implements `_merge_low_rank` too.
    """

    elementwise: bool = False
    """Whether entries are merged one by one, so that tensors of any number of dimensions will do."""

    linear: bool = False
    """Whether the result is linear in the coefficients: D = Σ_t λ_t C_t, with parts C_t that they do not change."""

    not_low_rank: str = ""
    """Why the method's result is not low-rank where the inputs are; empty if it is."""

    only_low_rank: str = ""
    """What says that the method merges low-rank inputs only; empty if it takes dense ones too."""

    needs: Need | None = None
    """Which statistics of the tasks' data the method needs, if it needs any."""

    num_samples: int | None = None
    """How many training samples of each task the statistics must be of; any number will do if left out."""

    propagate: bool = False
    """Whether its statistics are those of inputs that come through the merged blocks before."""

    acts_on_inputs: bool = False
    """Whether the method tells the columns of a matrix, a layer's inputs, from its rows: one that is stored (in, out)
    is merged the other way round."""

    weighs: bool = False
    """Whether coefficients are the weights of a mean, so that a factor on all of them changes nothing."""

    scale: float
    """Factor on the merged delta."""

    _statistics: Sequence[Statistics] = ()

    @property
    def works_in_pieces(self) -> bool:
        """Whether an entry of the result depends on the same entry of the deltas only, once the method is calibrated.

        Then a parameter may be merged a few rows at a time, and several threads may calibrate, each on its share of the
        stream: what they find must be summed by `reduce`, as over ranks.
        """
        return False

    def merge(
        self,
        deltas: Sequence[Delta],
        coefficients: Sequence[float] | None = None,
        *,
        statistics: Sequence[Statistics] | None = None,
    ) -> Tensor:
        """Merge one parameter's deltas.

        Args:
            deltas: N deltas of one shape, (m, n) for matrix methods; dense, low-rank or both. They are not changed.
            coefficients: N finite numbers λ; default 1.0 each.
            statistics: N statistics of the tasks' data, for the methods that have `needs`; others leave them aside.

        Returns:
            The merged delta, dense, in float32 for half-precision inputs, else in the inputs' precision.

        Raises:
            ValueError: If the deltas, coefficients or statistics do not fit together or are not finite, the method is
                one for low-rank deltas only and some are dense, or the merged delta is beyond the precision; says
                which.
        """
        if statistics is not None:
            return self.informed(statistics).merge(deltas, coefficients)
        checked, weights = self._check(deltas, coefficients)
        factors = [delta for delta in checked if isinstance(delta, LowRank)]
        with ieee_arithmetic(checked[0].device):
            if self.supports_low_rank and len(factors) == len(checked):
                merged = self._merge_low_rank(factors, weights).dense()
            else:
                merged = self._merge([densify(delta) for delta in checked], weights)
            check_result(type(self).__name__, merged, checked)
            return merged

    def merge_low_rank(
        self,
        deltas: Sequence[Delta],
        coefficients: Sequence[float] | None = None,
        *,
        rank: int | None = None,
        statistics: Sequence[Statistics] | None = None,
    ) -> LowRank:
        """Merge one parameter's low-rank deltas into a low-rank delta, exactly.

        Args:
            deltas: N low-rank deltas of one shape (m, n); their ranks may differ.
            coefficients: As for `merge`.
            rank: Truncate the result to this rank. `LowRank.truncate` does the same and reports the error.
            statistics: As for `merge`.

        Returns:
            The merged delta as factors, of rank at most the sum of the ranks.

        Raises:
            ValueError: If the method is not exact on factors, or an input is dense; and as `merge`.
        """
        if statistics is not None:
            return self.informed(statistics).merge_low_rank(deltas, coefficients, rank=rank)
        if not self.supports_low_rank:
            raise ValueError(f"{type(self).__name__} has no low-rank result: {self.not_low_rank}; use merge instead")
        checked, weights = self._check(deltas, coefficients)
        factors = [delta for delta in checked if isinstance(delta, LowRank)]
        if len(factors) != len(checked):
            raise ValueError(
                f"{type(self).__name__}: merge_low_rank needs LowRank deltas, dense of tasks {_dense(checked)}"
            )
        with ieee_arithmetic(checked[0].device):
            merged = self._merge_low_rank(factors, weights)
            check_result(type(self).__name__, merged, checked)
            return merged if rank is None else merged.truncate(rank)[0]

    @property
    def supports_low_rank(self) -> bool:
        """Whether `merge_low_rank` is exact for this method."""
        return not self.not_low_rank

    def calibrate(
        self,
        stream: Callable[[], Iterable[Sequence[Delta]]],
        *,
        reduce: Reduce = identity,
        num_tasks: int | None = None,
    ) -> Self:
        """Fix what depends on the whole model; nothing, for most methods.

        Args:
            stream: Called once or more; yields the N tasks' deltas that `merge` will be called with: those of one
                parameter after another, of one expert or part of a fused matrix after another, or of one piece after
                another if the method works in pieces.
            reduce: Sums a tensor over ranks, where each rank streams only its share of the parameters.
            num_tasks: Number of tasks; only needed by a rank whose share may be empty.

        Returns:
            The method to merge with.
        """
        return self

    def keyed(self, keys: Sequence[str], *, start: int = 0) -> Self:
        """Tie random draws to names instead of positions; nothing, for methods that draw nothing.

        Args:
            keys: One name for each task, such as "task/parameter".
            start: How many entries of the parameter come before those that will be merged: a multiple of `PIECE_STEP`.

        Returns:
            A method whose draws for task i depend on its seed and `keys[i]` only.
        """
        return self

    def informed(self, statistics: Sequence[Statistics]) -> Self:
        """Tell the method of the tasks' data what it `needs` for one parameter; nothing, for most methods.

        Args:
            statistics: One for each task.

        Returns:
            The method to merge that parameter with.
        """
        return self if self.needs is None else self._with(_statistics=tuple(statistics))

    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        """Estimate the work of merging one parameter, to share parameters out over processes.

        Args:
            shape: Its shape; (m, n) for matrix methods.
            num_tasks: Number of tasks N.
            rank: Sum of the tasks' ranks where all deltas are low-rank.

        Returns:
            About how many double-precision operations of a CPU it is worth; what is not arithmetic is converted at the
            rates of one core.
        """
        if rank is None:
            return COST_PER_VALUE * num_tasks * prod(shape)
        return COST_PER_VALUE * rank * sum(shape) + rank * prod(shape)

    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        """The side of the largest square matrix of doubles that is decomposed; 0 for none, as where entries are merged.

        Args:
            shape: As for `cost`.
            num_tasks: As for `cost`.
            rank: As for `cost`.
        """
        if self.elementwise or len(shape) != 2:
            return 0
        return min(*shape, *([] if rank is None else [rank]))

    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments by name: numbers, words, and for some methods another method."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @abstractmethod
    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        """Merge checked dense deltas of one precision."""

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        """Merge checked low-rank deltas of one precision; only called where `supports_low_rank`."""
        raise NotImplementedError(f"{type(self).__name__} leaves not_low_rank empty, but merges no factors")

    def _check(self, deltas: Sequence[Delta], coefficients: Sequence[float] | None) -> tuple[list[Delta], list[float]]:
        name = type(self).__name__
        with torch.no_grad():
            checked = check_deltas(name, deltas, matrices=not self.elementwise)
        if self.needs is not None:
            given, first = self._statistics or None, checked[0]
            check_statistics(name, self.needs, given, len(checked), first.shape, first.device)
        if self.only_low_rank and (dense := _dense(checked)):
            raise ValueError(f"{name}: {self.only_low_rank}, but those of tasks {dense} are dense")
        return checked, check_coefficients(name, coefficients, len(checked))

    def _take_after(self, method: Method) -> None:
        """Take over what a method says of itself, for a step around it, which merges by that method."""
        self.not_low_rank, self.only_low_rank = method.not_low_rank, method.only_low_rank
        self.needs, self.num_samples, self.propagate = method.needs, method.num_samples, method.propagate
        self.acts_on_inputs, self.weighs = method.acts_on_inputs, method.weighs

    def _with(self, **changes: object) -> Self:
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _dense(deltas: Sequence[Delta]) -> list[int]:
    return [task for task, delta in enumerate(deltas) if not isinstance(delta, LowRank)]
