r"""The joint basis of one parameter's deltas: steps 1 to 3 of Decom-Renorm-Merge (see `drm.py`), done once.

DRM decomposes the stack of all deltas and scales every row of every task's block to unit length; KnOTS works in the
same basis. The algebra spares the SVD of the stack:

.. math:: [D_1 \cdots D_N] = U \Sigma\, [V_1^T \cdots V_N^T] \quad\Rightarrow\quad
    \Sigma V_t^T = U^T D_t, \qquad \sum_t D_t D_t^T = U \Sigma^2 U^T

* Only U is needed: row i of task t is row i of :math:`U^T D_t`, its length is :math:`\sigma_{t,i}`, and nothing is
  divided by :math:`\sigma_i`.
* U holds the eigenvectors of an (m, m) Gram matrix. Where N n < m, the Gram matrix of the stack's columns is smaller;
  its eigenvectors are the rows V themselves.
* Rotating the rows of all deltas rotates U and nothing else, so low-rank deltas are decomposed in row coordinates.

The vertical direction is the same on transposed deltas, which are only ever views.

Where float64 data have directions that are kept, but that a Gram matrix does not resolve, the SVD of the stack takes
over.

Cost, for r kept directions: m² N n / 2 products in float64, an eigenproblem of size m, and m r N n products. Memory:
what the eigenproblem takes, and then U and the rows, which are as large as the stacked deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from lightning_drm.merging.linalg.eigen import eigen, eigen_cost
from lightning_drm.merging.linalg.spectral import (
    LENGTH,
    gram,
    needs_svd,
    rank_tolerance,
    rounding_error,
    row_lengths,
)
from lightning_drm.merging.low_rank import Delta, LowRank, densify, row_coordinates
from lightning_drm.merging.method import COST_PER_VALUE
from lightning_drm.merging.scaling import near_one

Direction = Literal["horizontal", "vertical"]


@dataclass(frozen=True, eq=False)
class JointBasis:
    r"""N deltas in their joint basis, up to the directions that were dropped.

    .. math:: D_t = 2^e\, U\, \mathrm{diag}(\sigma_t)\, \tilde V_t^T

    Made by `DRM.prepare` and `KnOTS.prepare`, used by their `merge_prepared`.

    Args:
        U: Left singular vectors of the stacked deltas, shape (m, r); of the transposed deltas if vertical.
        rows: Each task's :math:`\tilde V_t^T`, N tensors of shape (r, n); the rows have unit length or are zero.
        sigma: The lengths :math:`\sigma_{t,i}` that they had, shape (N, r). Zero where a task has no part in a
            direction.
        direction: How the deltas were stacked.
        rank_tol: Fraction of the largest singular value up to which directions were dropped.
        rank_drop: Fraction of the remaining directions that was dropped.
        dtype: Precision of a merged delta.
        exponent: Power of two that deltas of unusual size were divided by, see `scaling.py`; it is not in `sigma`.

    Example:
        Two tasks that share no direction. A row of (3, 4) has length 5.

        >>> from lightning_drm import DRM
        >>> deltas = [torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])]
        >>> basis = DRM().prepare(deltas)
        >>> basis.sigma
        tensor([[5., 0.],
                [0., 2.]])
        >>> basis.rows[0].abs()
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """

    U: Tensor
    rows: tuple[Tensor, ...]
    sigma: Tensor
    direction: Direction
    rank_tol: float
    rank_drop: float
    dtype: torch.dtype
    exponent: int = 0

    @classmethod
    def of(cls, deltas: Sequence[Delta], direction: Direction, rank_tol: float, rank_drop: float) -> Self:
        """Decompose deltas that have been checked; arguments as for `DRM`."""
        scaled, exponent = near_one(deltas)
        sides = [delta.T for delta in scaled] if direction == "vertical" else scaled
        factors = [side for side in sides if isinstance(side, LowRank)]
        if len(factors) == len(sides):
            Q, coordinates = row_coordinates(factors)
            U, rows, sigma = _decompose(coordinates, rank_tol, rank_drop)
            U = Q @ U
        else:
            U, rows, sigma = _decompose([densify(side) for side in sides], rank_tol, rank_drop)
        return cls(U, rows, sigma, direction, rank_tol, rank_drop, deltas[0].dtype, exponent)


def joint_basis_cost(
    shape: tuple[int, ...], num_tasks: int, rank: int | None, direction: Direction = "horizontal"
) -> float:
    """What decomposing one parameter's deltas, and merging and multiplying what comes of it, is worth.

    The arguments, and the unit, are those of `Method.cost`.
    """
    height, width = reversed(shape) if direction == "vertical" else shape
    rows = height if rank is None else min(height, rank)
    short, long = _sides(shape, num_tasks, rank, direction)
    decompose = eigen_cost(short) + short**2 * long  # half a Gram matrix
    project = short * rows * num_tasks * width  # in single precision, as the product at the end
    product = short * height * width
    return decompose + project + product + COST_PER_VALUE * num_tasks * rows * width


def joint_basis_side(
    shape: tuple[int, ...], num_tasks: int, rank: int | None, direction: Direction = "horizontal"
) -> int:
    """The side of the Gram matrix of one parameter's deltas; the arguments are those of `Method.square_side`."""
    return _sides(shape, num_tasks, rank, direction)[0]


def _sides(shape: tuple[int, ...], num_tasks: int, rank: int | None, direction: Direction) -> list[int]:
    """The shorter and the longer side of the stack that is decomposed."""
    height, width = reversed(shape) if direction == "vertical" else shape
    rows = height if rank is None else min(height, rank)
    return sorted((rows, num_tasks * width))


Decomposed = tuple[Tensor, tuple[Tensor, ...], Tensor]
"""U (m, r), N matrices of unit rows (r, n), and the rows' lengths (N, r)."""


def _decompose(deltas: Sequence[Tensor], rank_tol: float, rank_drop: float) -> Decomposed:
    """The joint basis of N matrices (m, n) side by side."""
    (height, width), dtype = deltas[0].shape, deltas[0].dtype
    tolerance = max(rank_tol, rank_tolerance((height, len(deltas) * width), dtype))
    is_wide = height <= len(deltas) * width
    values, vectors = eigen(lambda: gram(deltas if is_wide else _stacked_rows(deltas)))
    S = values.sqrt()
    rank = _num_kept(S, tolerance, rank_drop)
    if rank and needs_svd(dtype, float(S[rank - 1]), float(S[0])):
        U, S, _ = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
        return _project(U[:, : _num_kept(S, tolerance, rank_drop)], deltas)
    if is_wide:
        return _project(vectors[:, :rank].to(dtype).contiguous(), deltas)  # not a view of all
    return _expand(S[:rank], vectors[:, :rank], deltas)


def _num_kept(S: Tensor, tolerance: float, rank_drop: float) -> int:
    """How many of the descending singular values S take part: at least one, unless all are zero."""
    above = int((tolerance * S[0] < S).sum()) if len(S) else 0
    return max(round((1 - rank_drop) * above), min(above, 1))


def _project(U: Tensor, deltas: Sequence[Tensor]) -> Decomposed:
    """From U alone: the rows are Uᵀ D_t."""
    rows, sigma = [], U.new_empty(len(deltas), U.shape[1])
    for task, delta in enumerate(deltas):
        row = U.T @ delta
        lengths = row_lengths(row)
        sigma[task] = torch.where(lengths > rounding_error(lengths, row.dtype), lengths, 0)
        rows.append(_scale(row, sigma[task]))
    return U, tuple(rows), sigma


def _expand(S: Tensor, V: Tensor, deltas: Sequence[Tensor]) -> Decomposed:
    """From Σ and V of a stack that is taller than wide: the rows are Σ V_tᵀ, and U = Σ_t D_t V_t / Σ."""
    dtype = deltas[0].dtype
    blocks = torch.split(V, deltas[0].shape[1])
    U = V.new_zeros(len(deltas[0]), len(S))
    for delta, block in zip(deltas, blocks, strict=True):
        U.addmm_(delta.double(), block / S)
    sigma = U.new_empty(len(deltas), len(S))
    rows = []
    for task, block in enumerate(blocks):
        row = (block * S).T.contiguous()
        lengths = row_lengths(row)
        # The rows come from V, so their error is one of the whole stack, also where a task's delta is small.
        sigma[task] = torch.where(lengths > rounding_error(S, S.dtype), lengths, 0)
        rows.append(_scale(row, sigma[task]).to(dtype))
    return U.to(dtype), tuple(rows), sigma.to(dtype)


def _scale(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows (r, n) of given lengths (r,) scaled to unit length, in place.

    A row of length zero becomes zero: it is rounding error, of a task without a part in that direction. Scaled up to
    unit length, it would let noise take part in the pruning.
    """
    # Not times 1 / length: a row of one entry must become exactly ±1, since pruning compares magnitudes.
    return rows.div_(torch.where(lengths > 0, lengths, torch.inf)[:, None])


def _stacked_rows(deltas: Sequence[Tensor]) -> Iterator[Tensor]:
    """The horizontal stack, a few of its rows at a time, transposed."""
    for rows in zip(*(torch.split(delta, LENGTH) for delta in deltas), strict=True):
        yield torch.cat(rows, dim=1).T
