"""Merging one parameter in its own shape: as it is, as one or many matrices, or in the parts of a fused matrix."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_drm.fusion.recipe import Split, Treatment, split_sizes
from lightning_drm.merging import Delta, LowRankStack, Method
from lightning_drm.merging.low_rank import densify
from lightning_drm.merging.scaling import peak

Merge: TypeAlias = Callable[[Method, Sequence[Delta], Sequence[float]], Tensor]
"""A method, N deltas of one shape, and N coefficients, in; the merged delta out: `Method.merge`, or as good."""


def merge_parameter(
    method: Method,
    deltas: Sequence[Delta],
    treatment: Treatment,
    *,
    transposed: bool,
    merge: Merge = Method.merge,
) -> Tensor:
    """Merges the deltas of one parameter, or of a piece of it.

    A method on matrices sees a convolution's weight (out, in, k, k) as a matrix (out, in·k·k), and the experts
    (E, m, n) of a layer as E matrices.

    Args:
        method: The calibrated method.
        deltas: N deltas of one shape.
        treatment: Coefficients, the parts of a matrix that is merged in parts, and whether they are experts.
        transposed: Whether a matrix is stored (in, out), so that its parts are columns.
        merge: Merges one matrix, or one tensor entry by entry.

    Returns:
        The merged delta, in the shape of the deltas.

    Raises:
        ValueError: If the method refuses the deltas, or nothing is left of a matrix that tasks changed.
    """
    if not treatment.expert_by_expert:
        return _merge_one(method, deltas, treatment, transposed, merge)
    merged = torch.zeros(deltas[0].shape, device=deltas[0].device)
    for index, of_expert in enumerate(experts(deltas)):
        try:
            one = _merge_one(method, of_expert, treatment, transposed, merge)
        except ValueError as error:
            raise ValueError(f"expert {index}: {error}") from error
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


def _merge_one(method: Method, deltas: Sequence[Delta], treatment: Treatment, transposed: bool, merge: Merge) -> Tensor:
    """Merges one matrix, or a tensor of any shape entry by entry."""
    if treatment.split is not None:
        merged = _merge_parts(method, deltas, treatment.split, treatment.coefficients, transposed, merge)
    elif method.elementwise or len(deltas[0].shape) == 2:
        merged = merge(method, deltas, treatment.coefficients)
    else:
        matrices = [delta.flatten(1) for delta in deltas if isinstance(delta, Tensor)]
        merged = merge(method, matrices, treatment.coefficients).reshape(deltas[0].shape)
    if not method.elementwise:
        _require_some(method, merged, deltas, treatment.coefficients)
    return merged


def _merge_parts(
    method: Method,
    deltas: Sequence[Delta],
    split: Split,
    coefficients: Sequence[float],
    transposed: bool,
    merge: Merge,
) -> Tensor:
    """Merges the parts of a fused matrix one by one."""
    axis = -1 if transposed else -2
    merged, start = [], 0
    for size in split_sizes(split, deltas[0].shape[axis]):
        merged.append(merge(method, [_part(delta, axis, start, size) for delta in deltas], coefficients))
        start += size
    return torch.cat(merged, dim=axis)


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
