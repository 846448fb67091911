"""Decom-Renorm-Merge (arXiv 2505.23117): merge in the joint basis of all tasks, after renormalising each task's part.

The mathematics is in `joint_basis` (decompose, renormalise) and `election` (vote, average); this is the method with its
parameters. Where the paper's text and its published code differ, the published code is the default: directions whose
singular value is at most 1 % of the largest are dropped (`rank_tol`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lightning_drm.merging.inputs import check_deltas, choice, finite, refuse, share
from lightning_drm.merging.joint_basis import Direction, JointBasis, Prune
from lightning_drm.merging.low_rank import Delta, LowRank
from lightning_drm.merging.method import Method


class DRM(Method):
    """Decom-Renorm-Merge: prune, elect signs and average in the renormalised joint basis of all tasks' deltas.

    Every step of the paper's ablation (Table 7) is a switch.

    Args:
        direction: Stack the deltas side by side ("horizontal", DRM-H) or on top of each other ("vertical", DRM-V).
        density: Share of the entries of all basis blocks to keep, in (0, 1].
        rank_tol: Drop joint directions whose singular value is at most this share of the largest, in [0, 1). Directions
            that are rounding noise are dropped in any case.
        rank_drop: Then drop this share of the remaining directions, the weakest, in [0, 1) (appendix H.1).
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
        prune: Prune = "joint",
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
                choice("prune", prune, get_args(Prune)),
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
        """Decompose once what then yields the merged delta for any density, coefficients and switches.

        Args:
            deltas: As for `merge`.

        Returns:
            The deltas in their joint basis. `direction`, `rank_tol` and `rank_drop` are fixed by it.

        Raises:
            ValueError: As `merge`.
        """
        with torch.no_grad():
            checked = check_deltas("DRM", deltas, matrices=True)
            return JointBasis.of(checked, self.direction, self.rank_tol, self.rank_drop)

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop)
        return basis.merge(
            coefficients,
            density=self.density,
            renormalize=self.renormalize,
            prune=self.prune,
            elect_sign=self.elect_sign,
            disjoint=self.disjoint,
            scale=self.scale,
        )

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop)
        return basis.merge_low_rank(
            coefficients,
            density=self.density,
            renormalize=self.renormalize,
            prune=self.prune,
            elect_sign=self.elect_sign,
            disjoint=self.disjoint,
            scale=self.scale,
        )
