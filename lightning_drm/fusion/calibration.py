"""Showing a method whole task vectors before it merges any parameter: TIES takes its threshold over all of one.

Every rank shows the method its own share of the parameters, and where parameters come in pieces, several threads show
it some pieces each. What the method counts is summed over all of them, so all merge with the same threshold. A method
on matrices is shown one expert after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import starmap

from lightning_drm.fusion.parameter import experts
from lightning_drm.fusion.recipe import Treatment
from lightning_drm.fusion.task_deltas import Piece, TaskDeltas
from lightning_drm.fusion.threads import num_threads, summed_over_threads
from lightning_drm.merging import Delta, Method
from lightning_drm.merging.inputs import check_deltas
from lightning_drm.merging.linalg.selection import Reduce


def calibrated_methods(
    treatments: Mapping[str, Treatment],
    pieces: Mapping[str, Sequence[Piece]],
    deltas: TaskDeltas,
    reduce: Reduce,
    *,
    in_threads: bool,
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
        try:
            one_by_one = {name for name in names if treatments[name].expert_by_expert}
            ready = _calibrated(method, own, deltas, one_by_one, reduce, in_threads and method.works_in_pieces)
        except ValueError:
            _refuse_first(method, own, deltas, one_by_one)
            raise
        methods.update(dict.fromkeys(names, ready))
    return methods


def _calibrated(
    method: Method,
    pieces: Sequence[Piece],
    deltas: TaskDeltas,
    one_by_one: Set[str],
    reduce: Reduce,
    threads: bool,
) -> Method:
    num_tasks = len(deltas.tasks)

    def stream() -> Iterator[Sequence[Delta]]:
        for (name, _), found in zip(pieces, deltas.stream(pieces), strict=True):
            yield from experts(found) if name in one_by_one else [found]
            del found  # before the next ones come

    if not threads:
        return method.calibrate(stream, reduce=reduce, num_tasks=num_tasks)

    def of_thread(own: Callable[[], Iterator[Piece]], add_up: Reduce) -> Method:
        return method.calibrate(lambda: starmap(deltas.read, own()), reduce=add_up, num_tasks=num_tasks)

    return summed_over_threads(of_thread, pieces, reduce, num_threads(deltas.device))


def _refuse_first(method: Method, pieces: Sequence[Piece], deltas: TaskDeltas, one_by_one: Set[str]) -> None:
    """Refuses the first delta that the method cannot take, by name; threads meet deltas in any order."""
    for (name, _), found in zip(pieces, deltas.stream(pieces), strict=True):
        try:
            for matrices in experts(found) if name in one_by_one else [found]:
                check_deltas(type(method).__name__, matrices, matrices=not method.elementwise)
        except ValueError as error:
            raise deltas.explained(error, name) from error
