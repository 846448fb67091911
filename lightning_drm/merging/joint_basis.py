"""The joint basis of one parameter's deltas: the expensive half of Decom-Renorm-Merge, done once.

DRM (arXiv 2505.23117) decomposes the horizontal stack `[D_1 … D_N] = U Σ [V_1ᵀ … V_Nᵀ]` and scales every row of every
block V_tᵀ to unit length. What follows from the algebra, and spares the SVD:

* `Σ V_tᵀ = Uᵀ D_t`, so only U is needed; the renormalised row i of task t is row i of `Uᵀ D_t` over its length σ_{t,i}.
* U holds the eigenvectors of the Gram matrix `Σ_t D_t D_tᵀ` (m × m). Where N n < m, the Gram matrix of the stack's
  columns is smaller; its eigenvectors are the rows V themselves.
* Rotating the rows of all deltas rotates U and nothing else. So low-rank deltas are decomposed in row coordinates.

The vertical direction is the same on transposed deltas, which are only ever views.

Cost, for r kept directions: m² N n / 2 products in float64, an eigenproblem of size m, and m r N n products. Memory:
U and the projections, which are as large as the stacked deltas, after the eigenproblem's own. Where U is half as large,
a basis that serves a single merge may be lean: it holds the rows of seven tasks in eight, and projects the others'
deltas again, a few directions at a time, whenever they are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from lightning_drm.merging.linalg.spectral import LENGTH, eigen, gram, needs_svd, rank_tolerance, rounding_error
from lightning_drm.merging.low_rank import Delta, LowRank, densify, row_coordinates

Direction = Literal["horizontal", "vertical"]


@dataclass(frozen=True, eq=False)
class JointBasis:
    """N deltas in their joint basis. Made by `DRM.prepare`, used by `DRM.merge_prepared`.

    Args:
        U: Left singular vectors of the stacked deltas, shape (m, r); of the transposed deltas if vertical.
        rows: The first tasks' rows in that basis, of unit length or zero, tensors of shape (r, n): ṽ of the paper.
        deltas: The other tasks' deltas, as they were stacked, tensors of shape (m, n); none unless the basis is lean.
        sigma: The lengths they had, shape (N, r). Zero where a task has no part in a direction.
        direction: How the deltas were stacked.
        rank_tol: Share of the largest singular value up to which directions were dropped.
        rank_drop: Share of the remaining directions that was dropped.
        dtype: Precision of a merged delta.
    """

    U: Tensor
    rows: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    sigma: Tensor
    direction: Direction
    rank_tol: float
    rank_drop: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls, deltas: Sequence[Delta], direction: Direction, rank_tol: float, rank_drop: float, *, lean: bool = False
    ) -> Self:
        """Decompose deltas that have been checked; arguments as for `DRM`."""
        sides = [delta.T for delta in deltas] if direction == "vertical" else list(deltas)
        factors = [side for side in sides if isinstance(side, LowRank)]
        if len(factors) == len(sides):
            Q, coordinates = row_coordinates(factors)
            U, rows, sigma = _decompose(coordinates, rank_tol, rank_drop)
            return cls(Q @ U, rows, (), sigma, direction, rank_tol, rank_drop, deltas[0].dtype)
        dense = [densify(side) for side in sides]
        height, width = dense[0].shape
        num_late = len(dense) // 8 if lean and len(dense) * width <= 2 * height else 0
        U, rows, sigma = _decompose(dense, rank_tol, rank_drop, num_late)
        return cls(U, rows, tuple(dense[len(rows) :]), sigma, direction, rank_tol, rank_drop, deltas[0].dtype)

    def part(self, directions: slice) -> list[Tensor]:
        """Each task's rows in some directions: N tensors of shape (·, n)."""
        held = [row[directions] for row in self.rows]
        U, lengths = self.U[:, directions], self.sigma[len(held) :, directions]
        late = [_scale(U.T @ delta, length) for delta, length in zip(self.deltas, lengths, strict=True)]
        return held + late


def _decompose(
    deltas: Sequence[Tensor], rank_tol: float, rank_drop: float, num_late: int = 0
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Of N (m, n) matrices side by side: U (m, r), unit rows (r, n) but for the late, and the lengths of all (N, r)."""
    (height, width), dtype = deltas[0].shape, deltas[0].dtype
    tolerance = max(rank_tol, rank_tolerance((height, len(deltas) * width), dtype))
    if needs_svd(dtype, tolerance, 1.0):
        U, S, _ = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
        return _project(U[:, : _num_kept(S, tolerance, rank_drop)], deltas, num_late)

    def num_kept(values: Tensor) -> int:
        return _num_kept(values.sqrt(), tolerance, rank_drop)

    if height <= len(deltas) * width:
        return _project(eigen(lambda: gram(deltas), dtype, num_kept)[1], deltas, num_late)
    values, V = eigen(lambda: gram(_stacked_rows(deltas)), num_kept=num_kept)
    return _expand(values[: V.shape[1]].sqrt(), V, deltas)


def _num_kept(S: Tensor, tolerance: float, rank_drop: float) -> int:
    """How many of the descending singular values S take part: at least one, unless all are zero."""
    above = int((tolerance * S[0] < S).sum()) if len(S) else 0
    return max(round((1 - rank_drop) * above), min(above, 1))


def _project(U: Tensor, deltas: Sequence[Tensor], num_late: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """From U alone: the rows are Uᵀ D_t. Of the late tasks, which come last, only the lengths stay."""
    rows: list[Tensor] = []
    sigma = U.new_empty(len(deltas), U.shape[1])
    for task in reversed(range(len(deltas))):  # the late ones while there are no others
        row = U.T @ deltas[task]
        lengths = torch.linalg.vector_norm(row, dim=1)
        sigma[task] = torch.where(lengths > rounding_error(lengths), lengths, 0)
        if task < len(deltas) - num_late:
            rows.insert(0, _scale(row, sigma[task]))
    return U, tuple(rows), sigma


def _expand(S: Tensor, V: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
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
        lengths = torch.linalg.vector_norm(row, dim=1)
        # The rows come from V, so their error is one of the whole stack, also where a task's delta is small.
        sigma[task] = torch.where(lengths > rounding_error(S), lengths, 0)
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
