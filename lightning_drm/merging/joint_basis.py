"""The joint basis of one parameter's deltas, from which a merged delta for any setting is one cheap pass away.

Decom-Renorm-Merge (arXiv 2505.23117) decomposes the horizontal stack `[D_1 … D_N] = U Σ [V_1ᵀ … V_Nᵀ]`, scales every
row of every block V_tᵀ to unit length, prunes, elects signs and averages there, and multiplies U back on. What follows
from the algebra, and spares the SVD:

* `Σ V_tᵀ = Uᵀ D_t`, so only U is needed; the renormalised row i of task t is row i of `Uᵀ D_t` over its norm σ_{t,i}.
* U holds the eigenvectors of the Gram matrix `Σ_t D_t D_tᵀ` (m × m). Where N · n < m, the other Gram matrix, of the
  stack's columns, is smaller; its eigenvectors are the rows V themselves.
* The decomposition depends on neither density, coefficients nor switches: one `JointBasis` serves a whole grid.
* Rotating the rows of all deltas rotates U and nothing else. So low-rank deltas are merged in row coordinates.

The vertical direction is the same on transposed deltas, which are only ever views.

Cost, for r kept directions: m² N n (float64, half of it skipped) + eigenproblem of size m + r m N n + r m n. Memory:
the projections are as large as the stacked deltas; nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
from torch import Tensor

from lightning_drm.merging.election import SLICE, elect_and_average
from lightning_drm.merging.low_rank import Delta, LowRank, row_coordinates
from lightning_drm.merging.selection import thresholds
from lightning_drm.merging.spectral import GRAM_RESOLUTION, eigen, gram_of, rank_tolerance

Direction = Literal["horizontal", "vertical"]
Prune = Literal["joint", "individual"]


@dataclass(frozen=True, eq=False)
class JointBasis:
    """N deltas in their joint basis. `DRM.prepare` makes one.

    Args:
        U: Left singular vectors of the stacked deltas, shape (m, r); of the transposed deltas if `transposed`.
        rows: Each task's rows in that basis, scaled to unit length, shape (N, r, n): ṽ of the paper.
        sigma: The lengths they had, shape (N, r). Zero where a task has no part in a direction.
        transposed: Whether the deltas were stacked vertically.
        dtype: Precision of the merged delta.
    """

    U: Tensor
    rows: Tensor
    sigma: Tensor
    transposed: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, deltas: Sequence[Delta], direction: Direction, rank_tol: float, rank_drop: float) -> Self:
        """Decompose deltas that `check_deltas` has passed; arguments as for `DRM`."""
        transposed = direction == "vertical"
        dtype = deltas[0].dtype
        sides = [delta.T for delta in deltas] if transposed else list(deltas)
        if all(isinstance(side, LowRank) for side in sides):
            Q, coordinates = row_coordinates(cast("list[LowRank]", sides))
            U, rows = _decompose(coordinates, rank_tol, rank_drop, dtype)
            U = Q @ U
        else:
            dense = [side.dense() if isinstance(side, LowRank) else side for side in sides]
            U, rows = _decompose(dense, rank_tol, rank_drop, dtype)
        return cls(U, rows, _normalize(rows), transposed, dtype)

    @property
    def rank(self) -> int:
        """Number r of joint directions."""
        return self.rows.shape[1]

    def merge(
        self,
        coefficients: Sequence[float] | None = None,
        *,
        density: float = 0.2,
        renormalize: bool = True,
        prune: Prune = "joint",
        elect_sign: bool = True,
        disjoint: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """Merged delta for one setting, dense, of shape (m, n); arguments as for `DRM`."""
        rows = self._fuse(coefficients, density, renormalize, prune, elect_sign, disjoint).mul_(scale)
        merged = rows.T @ self.U.T if self.transposed else self.U @ rows
        return merged.to(self.dtype)

    def merge_low_rank(
        self,
        coefficients: Sequence[float] | None = None,
        *,
        density: float = 0.2,
        renormalize: bool = True,
        prune: Prune = "joint",
        elect_sign: bool = True,
        disjoint: bool = True,
        scale: float = 1.0,
    ) -> LowRank:
        """Merged delta for one setting, as factors of rank r; arguments as for `DRM`."""
        rows = self._fuse(coefficients, density, renormalize, prune, elect_sign, disjoint).mul_(scale)
        merged = LowRank(self.U, rows)
        return (merged.T if self.transposed else merged).to(self.dtype)

    def _fuse(
        self,
        coefficients: Sequence[float] | None,
        density: float,
        renormalize: bool,
        prune: Prune,
        elect_sign: bool,
        disjoint: bool,
    ) -> Tensor:
        """Prune, elect signs and average in the joint basis: (r, n)."""
        num_tasks, rank, width = self.rows.shape
        weights = [1.0] * num_tasks if coefficients is None else coefficients
        # Length of each row as pruning sees it: 1, or its share of the singular value.
        length = torch.ones_like(self.sigma)
        if not renormalize:
            length = self.sigma / self.sigma.norm(dim=0)
        limits = self._limits(length, density, prune)
        merged = self.rows.new_empty(rank, width)
        for part in _slices(self.rows):
            stack = self.rows[:, part] * length[:, part, None]
            stack[stack.abs() < limits] = 0
            stack *= (self.sigma / length.clamp(min=torch.finfo(length.dtype).tiny))[:, part, None]
            merged[part] = elect_and_average(stack, weights, elect_sign=elect_sign, disjoint=disjoint)
        return merged

    def _limits(self, length: Tensor, density: float, prune: Prune) -> Tensor:
        """Pruning thresholds, of shape (1 or N, 1, 1)."""

        def joint() -> Iterator[list[Tensor]]:
            for part in _slices(self.rows):
                yield [self.rows[:, part] * length[:, part, None]]

        def individual() -> Iterator[Tensor]:
            for part in _slices(self.rows):
                yield self.rows[:, part] * length[:, part, None]

        if prune == "joint":
            limits = thresholds(joint, density, num_tasks=1)
        else:
            limits = thresholds(individual, density, num_tasks=len(self.rows))
        return self.rows.new_tensor(limits)[:, None, None]


def _slices(rows: Tensor) -> Iterator[slice]:
    """Ranges of basis rows whose entries, over all tasks, fit into the cache."""
    num_tasks, rank, width = rows.shape
    size = max(1, SLICE // max(1, num_tasks * width))
    return (slice(start, start + size) for start in range(0, rank, size))


def _normalize(rows: Tensor) -> Tensor:
    """Scale all rows to unit length, in place, and return the lengths they had, (N, r).

    A row no longer than the rounding error of its task's projection is a task without a part in that direction. It
    becomes zero: scaled up to unit length, it would let noise take part in the pruning.
    """
    sigma = torch.linalg.vector_norm(rows, dim=2)
    noise = 8 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(sigma, dim=1, keepdim=True)
    sigma[sigma <= noise] = 0
    rows.mul_(torch.where(sigma > 0, 1 / sigma, 0)[:, :, None])
    return sigma


def _decompose(
    deltas: Sequence[Tensor], rank_tol: float, rank_drop: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """U (m, r) of the horizontal stack of (m, n) matrices, and the projections Uᵀ D_t, (N, r, n)."""
    num_rows, width = deltas[0].shape
    num_tasks = len(deltas)
    tolerance = max(rank_tol, rank_tolerance((num_rows, num_tasks * width), dtype))
    if tolerance < GRAM_RESOLUTION:
        U, S, _ = torch.linalg.svd(torch.cat(list(deltas), dim=1).double(), full_matrices=False)
        return _project(U[:, : _num_kept(S, tolerance, rank_drop)], deltas)
    if num_rows <= num_tasks * width:
        values, U = eigen(gram_of(deltas, num_rows, deltas[0].device))
        return _project(U[:, : _num_kept(values.sqrt(), tolerance, rank_drop)], deltas)
    values, V = eigen(_column_gram(deltas))
    S = values.sqrt()
    kept = _num_kept(S, tolerance, rank_drop)
    S, V = S[:kept], V[:, :kept]
    U = torch.zeros(num_rows, kept, dtype=torch.float64, device=V.device)
    for delta, block in zip(deltas, (V / S).split(width), strict=True):
        U.addmm_(delta.double(), block)
    rows = (S[:, None] * V.T).view(kept, num_tasks, width).transpose(0, 1)
    precision = deltas[0].dtype
    return U.to(precision), rows.to(precision, memory_format=torch.contiguous_format)


def _project(U: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    U = U.to(deltas[0].dtype)
    rows = U.new_empty(len(deltas), U.shape[1], deltas[0].shape[1])
    for row, delta in zip(rows, deltas, strict=True):
        torch.mm(U.T, delta, out=row)
    return U, rows


def _column_gram(deltas: Sequence[Tensor]) -> Tensor:
    """Gram matrix of the columns of the horizontal stack, (N n, N n): float64, lower triangle only."""
    stack = torch.cat(list(deltas), dim=1)
    return gram_of([stack.T], stack.shape[1], stack.device)


def _num_kept(S: Tensor, tolerance: float, rank_drop: float) -> int:
    """How many of the descending singular values S take part: none where all are zero."""
    above = int((tolerance * S[0] < S).sum()) if len(S) else 0
    return max(round((1 - rank_drop) * above), min(above, 1))
