"""Merging one parameter in its own shape: as it is, as one or many matrices, or in the parts of a fused matrix."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_drm.fusion.recipe import Split, Treatment, split_sizes
from lightning_drm.merging import Delta, LowRankStack, Method, Statistics
from lightning_drm.merging.low_rank import densify
from lightning_drm.merging.scaling import peak

Merge: TypeAlias = Callable[[Method, Sequence[Delta], Sequence[float]], Tensor]
"""A method, N deltas of one shape, and N coefficients, in; the merged delta out: `Method.merge`, or as good."""


def merge_parameter(
    method: Method,
    deltas: Sequence[Delta],
    treatment: Treatment,
    *,
    keys: Sequence[str],
    start: int = 0,
    transposed: bool,
    statistics: Sequence[Statistics] = (),
    merge: Merge = Method.merge,
) -> Tensor:
    """Merges the deltas of one parameter, or of a piece of it.

    A method on matrices sees a convolution's weight (out, in, k, k) as a matrix (out, in·k·k), and the experts
    (E, m, n) of a layer as E matrices.

    Args:
        method: The calibrated method.
        deltas: N deltas of one shape.
        treatment: Coefficients, the parts of a matrix that is merged in parts, and whether they are experts.
        keys: N names that random draws are tied to; those of an expert or a part have its number, too.
        start: How many entries of the parameter come before the piece.
        transposed: Whether a matrix is stored (in, out), so that its parts are columns.
        statistics: Those of the parameter, or of the piece, one for each task, for a method that needs them.
        merge: Merges one matrix, or one tensor entry by entry.

    Returns:
        The merged delta, in the shape of the deltas.

    Raises:
        ValueError: If the method refuses the deltas, or nothing is left of a matrix that tasks changed.
    """
    if not treatment.expert_by_expert:
        known = method.informed(statistics).keyed(keys, start=start)
        return _merge_one(known, deltas, treatment, keys, transposed, merge)
    merged = torch.zeros(deltas[0].shape, device=deltas[0].device)
    first = start // max(1, prod(deltas[0].shape[1:]))
    for index, of_expert in enumerate(experts(deltas)):
        try:
            own = _numbered(keys, first + index)
            known = method.informed([one.of_expert(index) for one in statistics]).keyed(own)
            one = _merge_one(known, of_expert, treatment, own, transposed, merge)
        except ValueError as error:
            raise ValueError(f"expert {first + index}: {error}") from error
        merged = merged.to(one.dtype)
        merged[index] = one
    return merged


def experts(deltas: Sequence[Delta]) -> Iterator[list[Delta]]:
    """The deltas of one expert after another, from those of all experts of a layer.

    Args:
        deltas: N deltas of shape (E, m, n).

    Yields:
        N deltas of shape (m, n), as views.
    """
    for index in range(deltas[0].shape[0]):
        yield [delta.matrix(index) if isinstance(delta, LowRankStack) else densify(delta)[index] for delta in deltas]


def one_by_one(
    method: Method, deltas: Sequence[Delta], treatment: Treatment, *, transposed: bool
) -> Iterator[list[Delta]]:
    """What `merge_parameter` has the method merge, one after another: what it is to be calibrated on, too.

    Args:
        method: The method.
        deltas: N deltas of one shape.
        treatment: As for `merge_parameter`.
        transposed: As for `merge_parameter`.

    Yields:
        N deltas: of an expert, of a part of a fused matrix, of a convolution as a matrix, or all as they are.
    """
    for each in experts(deltas) if treatment.expert_by_expert else [deltas]:
        if treatment.split is not None:
            yield from _parts(each, treatment.split, transposed)
        else:
            yield _as_matrices(method, each)


def _numbered(keys: Sequence[str], index: int) -> list[str]:
    return [f"{key}/{index}" for key in keys]


def _merge_one(
    method: Method,
    deltas: Sequence[Delta],
    treatment: Treatment,
    keys: Sequence[str],
    transposed: bool,
    merge: Merge,
) -> Tensor:
    """Merges one matrix, or a tensor of any shape entry by entry."""
    if transposed and method.acts_on_inputs:
        return _merge_one(method, [delta.T for delta in deltas], treatment, keys, False, merge).T
    if treatment.split is not None:
        merged = torch.cat(
            [
                merge(method.keyed(_numbered(keys, index)), part, treatment.coefficients)
                for index, part in enumerate(_parts(deltas, treatment.split, transposed))
            ],
            dim=-1 if transposed else -2,
        )
    else:
        merged = merge(method, _as_matrices(method, deltas), treatment.coefficients).reshape(deltas[0].shape)
    if not method.elementwise:
        _require_some(method, merged, deltas, treatment.coefficients)
    return merged


def _as_matrices(method: Method, deltas: Sequence[Delta]) -> list[Delta]:
    """A convolution's deltas as matrices, for a method that needs these; all others as they are."""
    if method.elementwise or len(deltas[0].shape) == 2:
        return list(deltas)
    return [delta.flatten(1) for delta in deltas if isinstance(delta, Tensor)]


def _parts(deltas: Sequence[Delta], split: Split, transposed: bool) -> Iterator[list[Delta]]:
    """The deltas of one part of a fused matrix after another, as views."""
    axis = -1 if transposed else -2
    start = 0
    for size in split_sizes(split, deltas[0].shape[axis]):
        yield [_part(delta, axis, start, size) for delta in deltas]
        start += size


def _part(delta: Delta, axis: int, start: int, size: int) -> Delta:
    """Some rows (axis -2) or columns (axis -1) of a matrix or of each matrix of a stack, as views."""
    if isinstance(delta, Tensor):
        return delta.narrow(axis, start, size)
    if axis == -1:
        return type(delta)(delta.up, delta.down.narrow(-1, start, size))
    return type(delta)(delta.up.narrow(-2, start, size), delta.down)


def _require_some(method: Method, merged: Tensor, deltas: Sequence[Delta], coefficients: Sequence[float]) -> None:
    """Refuses to lose what all tasks did to a matrix."""
    if merged.any() or not method.scale:
        return
    lost = [
        str(task)
        for task, (delta, coefficient) in enumerate(zip(deltas, coefficients, strict=True))
        if coefficient and float(peak(delta))
    ]
    if lost:
        raise ValueError(
            f"nothing is left of what task {', '.join(lost)} changed: the changes cancel each other, or {method!r} has "
            f"no room for {len(deltas)} tasks in a matrix of shape {tuple(merged.shape)}; an override can name another"
            " method for it"
        )
