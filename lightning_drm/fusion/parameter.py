"""Merging one parameter in its own shape: as it is, as one matrix, or in the parts of a fused matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drm.fusion.recipe import Split, Treatment, split_sizes
from lightning_drm.merging import Delta, Method
from lightning_drm.merging.low_rank import rows_of


def merge_parameter(method: Method, deltas: Sequence[Delta], treatment: Treatment, *, transposed: bool) -> Tensor:
    """Merges the deltas of one parameter, or of a piece of it.

    A method on matrices sees a convolution's weight (out, in, k, k) as a matrix (out, in·k·k).

    Args:
        method: The calibrated method.
        deltas: N deltas of one shape.
        treatment: Coefficients, and the parts of a matrix that is merged in parts.
        transposed: Whether a matrix is stored (in, out), so that its parts are columns.

    Returns:
        The merged delta, in the shape of the deltas.
    """
    if treatment.split is not None:
        return _merge_parts(method, deltas, treatment.split, treatment.coefficients, transposed)
    if method.elementwise or len(deltas[0].shape) == 2:
        return method.merge(deltas, treatment.coefficients)
    matrices = [delta.flatten(1) for delta in deltas if isinstance(delta, Tensor)]
    return method.merge(matrices, treatment.coefficients).reshape(deltas[0].shape)


def _merge_parts(
    method: Method, deltas: Sequence[Delta], split: Split, coefficients: Sequence[float], transposed: bool
) -> Tensor:
    """Merges the parts of a fused matrix one by one."""
    turned = [delta.T if transposed else delta for delta in deltas]
    merged, start = [], 0
    for size in split_sizes(split, turned[0].shape[0]):
        blocks = [rows_of(delta, slice(start, start + size)) for delta in turned]
        merged.append(method.merge([block.T if transposed else block for block in blocks], coefficients))
        start += size
    return torch.cat(merged, dim=1 if transposed else 0)
