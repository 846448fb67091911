r"""Prune, elect and average in a joint basis: the steps that Decom-Renorm-Merge and KnOTS share.

A `JointBasis` keeps each task's rows at unit length, and their lengths apart:
:math:`D_t = U\, \mathrm{diag}(\sigma_t)\, \tilde V_t^T`. The methods differ in which multiple of a row is compared with
the threshold. What it is multiplied by afterwards makes up the rest:

=============== ==================== ==================== ================================
pruning sees    before pruning       after it             used by
=============== ==================== ==================== ================================
`unit_rows`     1                    σ_{t,i}              DRM
`joint_rows`    σ_{t,i} / σ_i        σ_i                  DRM without renormalization, KnOTS
`scaled_rows`   σ_{t,i}              1                    KnOTS
=============== ==================== ==================== ================================

Here :math:`\sigma_i = \sqrt{\sum_t \sigma_{t,i}^2}` is the singular value of the stacked deltas. So the second line
sees the rows of :math:`V_t^T`, and the third those of :math:`U^T D_t`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_drm.merging.election import elect_and_average, slice_size
from lightning_drm.merging.joint_basis import JointBasis
from lightning_drm.merging.linalg.selection import TIE, prune, prune_each
from lightning_drm.merging.low_rank import LowRank
from lightning_drm.merging.scaling import times_power_


@dataclass(frozen=True, eq=False)
class WeighedRows:
    """The rows of all tasks in a joint basis, as pruning sees them.

    Args:
        basis: The joint basis of N tasks, of r directions.
        before: What unit rows are multiplied by before pruning, shape (N, r, 1); None for 1.
        after: What they are multiplied by after it, shape (N, r); None for 1.
    """

    basis: JointBasis
    before: Tensor | None
    after: Tensor | None

    def seen(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """What pruning sees of one task after another, in some directions: rows of shape (r, n)."""
        for task, rows in enumerate(self.basis.rows):
            yield rows[part] if self.before is None else rows[part] * self.before[task, part]

    def pruned(self, limits: Sequence[float]) -> tuple[Tensor, ...]:
        """The rows that are left of each task, N tensors of shape (r, n), at their full lengths.

        Args:
            limits: N thresholds, which `TIE` loosens.
        """
        left = [prune(rows, limit * (1 - TIE)) for rows, limit in zip(self.seen(), limits, strict=True)]
        if self.after is not None:
            for rows, lengths in zip(left, self.after, strict=True):
                rows.mul_(lengths[:, None])
        return tuple(left)

    def merged(
        self,
        limits: Sequence[float],
        coefficients: Sequence[float],
        *,
        scale: float,
        out: Tensor,
        elect_sign: bool = True,
        disjoint: bool = True,
    ) -> LowRank:
        """Prune, elect and average: slice by slice, so that no temporary is larger than one task's rows.

        Args:
            limits: As for `pruned`.
            coefficients: N numbers λ.
            scale: Factor on the merged delta.
            out: Takes the merged rows P, shape (r, n). It may be the first task's rows, of a basis that nobody needs
                any more.
            elect_sign: See `elect_and_average`.
            disjoint: See `elect_and_average`.

        Returns:
            The merged delta as its factors U and P.
        """
        basis = self.basis
        loosened = [limit * (1 - TIE) for limit in limits]
        for part in self._slices():
            stack = prune_each(list(self.seen(part)), loosened)
            if self.after is not None:
                stack.mul_(self.after[:, part, None])
            out[part] = elect_and_average(stack, coefficients, elect_sign=elect_sign, disjoint=disjoint).mul_(scale)
            del stack  # before the next one is made
        times_power_(out, basis.exponent)
        factors = LowRank(basis.U, out).to(basis.dtype)
        return factors.T if basis.direction == "vertical" else factors

    def _slices(self) -> Iterator[slice]:
        """Ranges of directions in which the rows of all tasks fit into the cache."""
        rank, width = self.basis.rows[0].shape
        size = max(1, slice_size(len(self.basis.sigma), self.basis.U.device) // max(1, width))
        return (slice(start, start + size) for start in range(0, rank, size))


def unit_rows(basis: JointBasis) -> WeighedRows:
    r"""Pruning sees unit rows, :math:`\tilde V_t^T`."""
    return WeighedRows(basis, None, basis.sigma)


def joint_rows(basis: JointBasis) -> WeighedRows:
    """Pruning sees the rows of V_tᵀ, which are parts of unit rows over all tasks."""
    joint = torch.linalg.vector_norm(basis.sigma, dim=0).clamp(min=torch.finfo(basis.sigma.dtype).tiny)
    return WeighedRows(basis, (basis.sigma / joint)[..., None], joint.expand_as(basis.sigma))


def scaled_rows(basis: JointBasis) -> WeighedRows:
    """Pruning sees the rows of Uᵀ D_t, but for the power of two that the basis has apart."""
    return WeighedRows(basis, basis.sigma[..., None], None)
