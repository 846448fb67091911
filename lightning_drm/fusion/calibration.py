"""Showing a method whole task vectors before it merges any parameter: TIES takes its threshold over all of one.

Every rank shows the method its own share of the parameters, and where parameters come in pieces, several threads show
it some pieces each. What the method counts is summed over all of them, so all merge with the same threshold. A method
on matrices is shown the matrices that it will merge: one expert, or one part of a fused matrix, after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

from lightning_drm.fusion.decompositions import Decompositions
from lightning_drm.fusion.parameter import one_by_one
from lightning_drm.fusion.recipe import Treatment
from lightning_drm.fusion.task_deltas import Piece, TaskDeltas
from lightning_drm.fusion.threads import num_threads, summed_over_threads
from lightning_drm.merging import Delta, Method, PreparedMethod
from lightning_drm.merging.linalg.selection import Reduce


def calibrated_methods(
    treatments: Mapping[str, Treatment],
    pieces: Mapping[str, Sequence[Piece]],
    deltas: TaskDeltas,
    reduce: Reduce,
    *,
    in_threads: bool,
    transposed: Set[str] = frozenset(),
    decompositions: Decompositions | None = None,
) -> dict[str, Method | None]:
    """The method of each parameter, ready to merge.

    A recipe's own method is calibrated on the parameters that it merges. Those that an override gives another density
    are calibrated apart from the rest, and what is averaged needs no calibration.

    Args:
        treatments: What is done to each parameter, by name.
        pieces: The pieces of the parameters that this rank shows to the methods, by the parameter's name.
        deltas: The tasks' deltas.
        reduce: Sums a tensor over ranks, all of which make this call.
        in_threads: Whether several threads may read, each one piece after another.
        transposed: Names of the matrices that are stored (in, out), whose parts are columns.
        decompositions: Keeps what a method prepares of each matrix, if merges are to use it again.

    Returns:
        By name, the method; ``None`` for a parameter that keeps the base's value.

    Raises:
        ValueError: If a method refuses a delta, with the name of its parameter.
    """
    names_of: dict[Method, list[str]] = {}
    for name, treatment in treatments.items():
        if treatment.rule == "method" and treatment.method is not None:
            names_of.setdefault(treatment.method, []).append(name)
    methods = {name: treatment.method for name, treatment in treatments.items()}
    for method, names in names_of.items():
        own = [piece for name in names for piece in pieces.get(name, ())]
        shown = _Shown(method, own, deltas, treatments, transposed)
        try:
            if in_threads and method.works_in_pieces:
                ready = _calibrated_in_threads(shown, reduce)
            else:
                ready = _calibrated(shown, reduce, decompositions)
        except ValueError:
            _refuse_first(shown)
            raise
        methods.update(dict.fromkeys(names, ready))
    return methods


@dataclass(frozen=True)
class _Shown:
    """A method, and what it is shown."""

    method: Method
    pieces: Sequence[Piece]
    deltas: TaskDeltas
    treatments: Mapping[str, Treatment]
    transposed: Set[str]

    def by_name(self) -> Iterator[tuple[str, Iterator[list[Delta]]]]:
        """Each piece's parameter, and what the method will merge of it, one after another."""
        for (name, _), found in zip(self.pieces, self.deltas.stream(self.pieces), strict=True):
            yield name, one_by_one(self.method, found, self.treatments[name], transposed=name in self.transposed)
            del found  # before the next ones come

    def stream(self) -> Iterator[Sequence[Delta]]:
        for _, each in self.by_name():
            yield from each


def _calibrated(shown: _Shown, reduce: Reduce, decompositions: Decompositions | None) -> Method:
    method, num_tasks = shown.method, len(shown.deltas.tasks)
    # A method of a user's own may calibrate itself on deltas though it prepares them to merge.
    if (
        decompositions is None
        or not isinstance(method, PreparedMethod)
        or type(method).calibrate is not PreparedMethod.calibrate
    ):
        return method.calibrate(shown.stream, reduce=reduce, num_tasks=num_tasks)

    def prepared() -> Iterator[Any]:
        for name, each in shown.by_name():
            prepare = decompositions.preparing(name)
            yield from (prepare(method, deltas) for deltas in each)

    return method.calibrate_prepared(prepared, reduce=reduce, num_tasks=num_tasks)


def _calibrated_in_threads(shown: _Shown, reduce: Reduce) -> Method:
    method, deltas = shown.method, shown.deltas

    def of_thread(own: Callable[[], Iterator[Piece]], add_up: Reduce) -> Method:
        return method.calibrate(lambda: starmap(deltas.read, own()), reduce=add_up, num_tasks=len(deltas.tasks))

    return summed_over_threads(of_thread, shown.pieces, reduce, num_threads(deltas.device))


def _refuse_first(shown: _Shown) -> None:
    """Refuses the first delta that the method cannot take, by name; threads meet deltas in any order."""
    for name, each in shown.by_name():
        try:
            for deltas in each:
                shown.method.calibrate(partial(iter, [deltas]), num_tasks=len(deltas))
        except ValueError as error:
            raise shown.deltas.explained(error, name) from error
