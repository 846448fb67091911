"""Decom-Renorm-Merge (arXiv 2505.23117): merge in the joint basis of all tasks, after renormalising each task's part.

1. Decompose the stacked deltas, drop weak directions, scale each task's rows to unit length: `JointBasis`.
2. Prune the unit rows by magnitude, with one threshold for all tasks.
3. Give the rows their lengths back; elect signs by mass; average over the tasks that agree: `elect_and_average`.
4. Multiply by U. The merged delta is a pair of factors before it is a matrix, so low-rank deltas stay low-rank.

Only step 1 is expensive, and it depends on neither density, coefficients nor switches. Where the paper's text and its
published code differ, the published code is the default: directions with at most 1 % of the largest singular value are
dropped (`rank_tol`). Unlike in the published code, a task without a part in a direction stays zero there, not NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.election import elect_and_average, slice_size
from lightning_drm.merging.inputs import check_coefficients, check_deltas, choice, finite, refuse, share
from lightning_drm.merging.joint_basis import Direction, JointBasis
from lightning_drm.merging.linalg.selection import prune_each, thresholds
from lightning_drm.merging.linalg.spectral import eigen_cost
from lightning_drm.merging.low_rank import Delta, LowRank
from lightning_drm.merging.method import COST_PER_VALUE, Method

PruneScope = Literal["joint", "individual"]

TIE = 1e-10
"""Relative difference up to which magnitudes count as equal to the pruning threshold, and are kept.

A task of rank 1 has the same unit row in every direction, up to sign and rounding. Without this, float64 rounding would
decide which of its equal entries survive. In float32 it rounds to nothing.
"""


class DRM(Method):
    """Decom-Renorm-Merge: prune, elect signs and average in the renormalised joint basis of all tasks' deltas.

    Every step of the paper's ablation (Table 7) is a switch.

    Args:
        direction: Stack the deltas side by side ("horizontal", DRM-H) or on top of each other ("vertical", DRM-V).
        density: Share of the entries of all basis blocks to keep, in (0, 1].
        rank_tol: Drop joint directions whose singular value is at most this share of the largest, in [0, 1). Directions
            that are rounding noise are dropped in any case.
        rank_drop: Then drop this share of the remaining directions, the weakest, in [0, 1) (appendix H.1); what
            is kept, (1 − rank_drop) r, is rounded, and never nothing.
        renormalize: Scale each task's part of each basis row to unit length before pruning.
        prune: One threshold for all tasks ("joint"), or one for each ("individual", Table 8).
        elect_sign: Drop entries whose sign disagrees with the majority's.
        disjoint: Average over the tasks that still have an entry instead of over all.
        scale: Factor on the merged delta.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        >>> delta = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> torch.allclose(DRM(density=1.0).merge([delta]), delta)
        True
    """

    def __init__(
        self,
        direction: Direction = "horizontal",
        density: float = 0.2,
        rank_tol: float = 1e-2,
        rank_drop: float = 0.0,
        renormalize: bool = True,
        prune: PruneScope = "joint",
        elect_sign: bool = True,
        disjoint: bool = True,
        scale: float = 1.0,
    ) -> None:
        refuse(
            "DRM",
            [
                choice("direction", direction, get_args(Direction)),
                share("density", density, zero=False, one=True),
                share("rank_tol", rank_tol, zero=True, one=False),
                share("rank_drop", rank_drop, zero=True, one=False),
                choice("prune", prune, get_args(PruneScope)),
                finite("scale", scale),
            ],
        )
        self.direction = direction
        self.density = density
        self.rank_tol = rank_tol
        self.rank_drop = rank_drop
        self.renormalize = renormalize
        self.prune = prune
        self.elect_sign = elect_sign
        self.disjoint = disjoint
        self.scale = scale

    def prepare(self, deltas: Sequence[Delta]) -> JointBasis:
        """Decompose once what then serves any density, coefficients and switches.

        Args:
            deltas: As for `merge`.

        Returns:
            The deltas in their joint basis, for this direction, `rank_tol` and `rank_drop`.

        Raises:
            ValueError: As `merge`.
        """
        with torch.no_grad():
            checked = check_deltas("DRM", deltas, matrices=True)
            return JointBasis.of(checked, self.direction, self.rank_tol, self.rank_drop)

    def merge_prepared(self, basis: JointBasis, coefficients: Sequence[float] | None = None) -> LowRank:
        """Merge deltas that have been decomposed before, possibly for another setting.

        A coefficient shared by all tasks only scales the result, as `scale` does: one call serves all of them.

        Args:
            basis: What `prepare` of a method with the same `direction`, `rank_tol` and `rank_drop` returned.
            coefficients: As for `merge`.

        Returns:
            The merged delta as factors, their inner dimension being the number of joint directions; `.dense()`
            multiplies them.

        Raises:
            ValueError: If the basis was prepared differently, or the coefficients are not N finite numbers.

        Example:
            >>> basis = DRM().prepare([torch.eye(3), 2 * torch.eye(3)])
            >>> [DRM(density=density).merge_prepared(basis).dense()[0, 0].item() for density in (0.1, 0.2)]
            [1.5, 1.5]
        """
        refuse(
            "DRM",
            (
                f"{name} is {getattr(self, name)!r}, but the basis was prepared with {getattr(basis, name)!r}"
                for name in ("direction", "rank_tol", "rank_drop")
                if getattr(self, name) != getattr(basis, name)
            ),
        )
        with torch.no_grad():
            checked = check_coefficients("DRM", coefficients, len(basis.sigma))
            return self._fuse(basis, checked, torch.empty_like(basis.rows[0]))

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        height, width = reversed(shape) if self.direction == "vertical" else shape
        rows = height if rank is None else min(height, rank)
        short, long = sorted((rows, num_tasks * width))
        precision = torch.float32 if rows <= num_tasks * width else torch.float64
        decompose = eigen_cost(short, precision) + short**2 * long  # half a Gram matrix
        project = short * rows * num_tasks * width  # in single precision, as the product at the end
        product = short * height * width
        return decompose + project + product + COST_PER_VALUE * num_tasks * rows * width

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop, lean=True)
        factors = self._fuse(basis, coefficients, basis.rows[0])
        del basis  # the other rows
        return factors.dense()

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop)
        return self._fuse(basis, coefficients, basis.rows[0])

    def _fuse(self, basis: JointBasis, coefficients: Sequence[float], merged: Tensor) -> LowRank:
        """Prune, elect and average: slice by slice, so that no temporary is larger than one task's rows.

        `merged` takes the outcome, (r, n). It may be the first task's rows, of a basis that nobody needs any more.
        """
        # Pruning sees unit rows or, without renormalisation, each row at its share of the joint singular value.
        joint = torch.linalg.vector_norm(basis.sigma, dim=0).clamp(min=torch.finfo(basis.sigma.dtype).tiny)
        shares, lengths = (None, basis.sigma) if self.renormalize else ((basis.sigma / joint)[..., None], joint[None])
        limits = self._limits(basis, shares)
        for part in _slices(basis):
            seen = list(_seen(basis, shares, part))
            merged[part] = elect_and_average(
                prune_each(seen, limits).mul_(lengths[:, part, None]),  # in no variable: gone before the next slice
                coefficients,
                elect_sign=self.elect_sign,
                disjoint=self.disjoint,
            ).mul_(self.scale)
        factors = LowRank(basis.U, merged).to(basis.dtype)
        return factors.T if self.direction == "vertical" else factors

    def _limits(self, basis: JointBasis, shares: Tensor | None) -> tuple[float, ...]:
        """One threshold for each task, the same for all where pruning is joint."""
        # Whole rows are quicker to count; of a lean basis they are not there.
        parts = list(_slices(basis)) if basis.deltas else [slice(0, basis.U.shape[1])]
        if self.prune == "joint":
            limits = thresholds(
                lambda: ([row] for part in parts for row in _seen(basis, shares, part)), self.density, num_tasks=1
            ) * len(basis.sigma)
        else:
            limits = thresholds(
                lambda: (_seen(basis, shares, part) for part in parts), self.density, num_tasks=len(basis.sigma)
            )
        return tuple(limit * (1 - TIE) for limit in limits)


def _seen(basis: JointBasis, shares: Tensor | None, part: slice) -> Iterable[Tensor]:
    """What pruning sees of each task in some directions: its unit rows, or these at their shares (N, r, 1)."""
    rows = basis.part(part)
    return rows if shares is None else (row * share for row, share in zip(rows, shares[:, part], strict=True))


def _slices(basis: JointBasis) -> Iterator[slice]:
    """Ranges of directions in which the rows of all tasks fit into the cache."""
    rank, width = basis.rows[0].shape
    size = max(1, slice_size(len(basis.sigma), basis.U.device) // max(1, width))
    return (slice(start, start + size) for start in range(0, rank, size))
