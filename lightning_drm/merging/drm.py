r"""Decom-Renorm-Merge (DRM, arXiv 2505.23117): prune, vote and average in a basis that all tasks share.

Entries at one position of two finetuned matrices need not mean the same thing; in a joint basis, whose rows have been
renormalized task by task, they do. For deltas :math:`D_1, …, D_N` of shape (m, n) and coefficients
:math:`\lambda_1, …, \lambda_N`, `direction="horizontal"` (DRM-H) is:

1. **Decompose** the stack of all deltas:

   .. math:: [D_1 \cdots D_N] = U \Sigma V^T

2. **Truncate**: keep the directions i with :math:`\sigma_i > \mathrm{rank\_tol} \cdot \sigma_1`; of these r, keep the
   strongest :math:`(1 - k)\, r`, where k is `rank_drop` (appendix H.1).
3. **Partition and renormalize**: :math:`V^T = [V_1^T \cdots V_N^T]`. Row i of task t becomes a unit vector, and its
   length moves into the singular value. A row of zeros stays zero.

   .. math:: \tilde v_{t,i} = v_{t,i} / \lVert v_{t,i} \rVert, \qquad \sigma_{t,i} = \sigma_i \lVert v_{t,i} \rVert

4. **Prune**: of the L entries of all tasks' :math:`\tilde V_t^T`, those strictly below the k-th smallest magnitude
   become zero, with :math:`k = L - \mathrm{round}(L \cdot \mathrm{density})`.
5. **Elect** a sign for each position by mass. Entries of the other sign become zero:

   .. math:: P_t = \Sigma_t \tilde V_t^T, \qquad \mathrm{sgn} \sum_t P_t

6. **Average disjointly**, each position over the tasks that still have an entry there:

   .. math:: P = \frac{\sum_t \lambda_t P_t}{\max(1, |\{t : P_t \ne 0\}|)}

7. **Reconstruct** the merged delta, with `scale` as a factor: :math:`D = \mathrm{scale} \cdot U P`.

DRM-V (`direction="vertical"`) stacks the deltas on top of each other: it is the transpose of DRM-H of all
:math:`D_t^T`.

In this code, `JointBasis` takes steps 1 to 3, `DRM._limits` finds the threshold of step 4, `WeighedRows` applies it and
takes steps 5 and 6, and `LowRank.dense` step 7.

What differs from the paper and from its published code:

* The paper does not mention `rank_tol`. The published code drops singular values up to 1 % of the largest; so does the
  default here, and ``rank_tol=0`` keeps all but rounding noise, as the text has it.
* A task without a part in a direction stays zero there. In the published code it becomes NaN.
* Magnitudes that equal the threshold up to 1e-10 of it count as equal, and stay (see `selection.TIE`). Where float32
  deltas have equal magnitudes by their structure (a bidiagonal matrix, a constant), rounding is coarser than that, and
  decides.
* The coefficients weigh the average, not the vote, as in the published code.
* Low-rank deltas stay factors, and the result is the same. The published code merges their dense products.

Only steps 1 to 3 are expensive, and they depend on neither density, coefficients, scale nor the switches of steps 4 to
6, so `prepare` takes them once for many settings. `joint_basis.py` says what they cost; the rest costs m r n products
and a few looks at each of the N r n entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.inputs import check_coefficients, choice, finite, fraction, refuse
from lightning_drm.merging.joint_basis import Direction, JointBasis, joint_basis_cost, joint_basis_side
from lightning_drm.merging.linalg.selection import thresholds
from lightning_drm.merging.low_rank import Delta, LowRank
from lightning_drm.merging.precision import ieee_arithmetic
from lightning_drm.merging.prepared import PreparedMethod
from lightning_drm.merging.weighed_rows import WeighedRows, joint_rows, unit_rows

PruneScope = Literal["joint", "individual"]


class DRM(PreparedMethod):
    r"""Decom-Renorm-Merge: prune, elect signs and average in the renormalized joint basis of all tasks' deltas.

    .. math:: D = \mathrm{scale} \cdot U\, \mathrm{merge}_t(\Sigma_t\, \mathrm{prune}(\tilde V_t^T)), \qquad
        [D_1 \cdots D_N] = U\, [\Sigma_1 \tilde V_1^T \cdots \Sigma_N \tilde V_N^T]

    The head of this file has the algorithm. Every step of the paper's ablation (Table 7) is a switch.

    Args:
        direction: Step 1: stack the deltas side by side ("horizontal", DRM-H) or on top of each other ("vertical",
            DRM-V).
        density: Step 4: fraction of the entries of all :math:`\tilde V_t^T` to keep, in (0, 1]; the paper's top-k %.
        rank_tol: Step 2: drop directions whose singular value is at most this fraction of the largest, in [0, 1).
            Directions that are rounding noise are dropped in any case.
        rank_drop: Step 2: then drop this fraction k of the remaining directions, the weakest, in [0, 1) (appendix H.1).
            The number kept, (1 − k) r, is rounded, and is at least 1.
        renormalize: Step 3: scale each task's part of each basis row to unit length before pruning.
        prune: Step 4: one threshold for all tasks ("joint"), or one for each ("individual", Table 8).
        elect_sign: Step 5: drop entries whose sign disagrees with the majority's.
        disjoint: Step 6: average over the tasks that still have an entry instead of over all N.
        scale: Step 7: factor on the merged delta.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        The tasks share no direction: :math:`U = I` and :math:`\Sigma = \mathrm{diag}(10, 1)`. The unit rows are
        (0.6, 0.8) for the first task and (1, 0) for the second. Two of their 8 entries stay, 0.8 and 1: the 6 goes, and
        the smaller 1 stays.

        >>> deltas = [torch.tensor([[6.0, 8.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
        >>> DRM(density=1 / 8).merge(deltas).round().int().tolist()
        [[0, 8], [1, 0]]
    """

    linear = True

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
                fraction("density", density, zero=False, one=True),
                fraction("rank_tol", rank_tol, zero=True, one=False),
                fraction("rank_drop", rank_drop, zero=True, one=False),
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

    @property
    @override
    def preparation(self) -> tuple[object, ...]:
        return self.direction, self.rank_tol, self.rank_drop

    @override
    def prepare(self, deltas: Sequence[Delta]) -> JointBasis:
        """Decompose once what then serves any density, coefficients and switches.

        Args:
            deltas: As for `merge`.

        Returns:
            The deltas in their joint basis, for this `direction`, `rank_tol` and `rank_drop`.

        Raises:
            ValueError: As `merge`.
        """
        checked, _ = self._check(deltas, None)
        with ieee_arithmetic(checked[0].device):
            return JointBasis.of(checked, self.direction, self.rank_tol, self.rank_drop)

    @override
    def merge_prepared(self, prepared: JointBasis, coefficients: Sequence[float] | None = None) -> LowRank:
        """Merge deltas that have been decomposed before, possibly for another setting.

        A coefficient shared by all tasks only scales the result, as `scale` does: one call serves all of them.

        Args:
            prepared: What `prepare` of a method with the same `direction`, `rank_tol` and `rank_drop` returned.
            coefficients: As for `merge`.

        Returns:
            The merged delta as factors U (m, r) and P (r, n), for r joint directions; `.dense()` multiplies them.

        Raises:
            ValueError: If the basis was prepared differently, or the coefficients are not N finite numbers.

        Example:
            >>> basis = DRM().prepare([torch.eye(3), 2 * torch.eye(3)])
            >>> [DRM(density=density).merge_prepared(basis).dense()[0, 0].item() for density in (0.1, 0.2)]
            [1.5, 1.5]
        """
        self._require_preparation_of(prepared)
        checked = check_coefficients("DRM", coefficients, len(prepared.sigma))
        with ieee_arithmetic(prepared.U.device):
            return self._fuse(prepared, checked, torch.empty_like(prepared.rows[0]))

    def pruned(self, prepared: JointBasis) -> tuple[Tensor, ...]:
        r"""What the tasks vote with: their rows :math:`P_t` in the joint basis, after pruning and before the election.

        .. math:: D_t \approx 2^e\, U P_t, \qquad P_t = \Sigma_t\, \mathrm{prune}(\tilde V_t^T)

        Args:
            prepared: As for `merge_prepared`.

        Returns:
            N tensors of shape (r, n), zero where pruned.

        Raises:
            ValueError: If the basis was prepared differently.

        Example:
            Of the unit rows (0.6, 0.8) and (1, 0), the 0.8 and the 1 stay.

            >>> method = DRM(density=1 / 4)
            >>> basis = method.prepare([torch.tensor([[6.0, 8.0]]), torch.tensor([[2.0, 0.0]])])
            >>> [rows.abs().tolist() for rows in method.pruned(basis)]
            [[[0.0, 8.0]], [[2.0, 0.0]]]
        """
        self._require_preparation_of(prepared)
        with ieee_arithmetic(prepared.U.device):
            rows = self._rows(prepared)
            return rows.pruned(self._limits(rows))

    def _require_preparation_of(self, prepared: JointBasis) -> None:
        refuse(
            "DRM",
            (
                f"{name} is {getattr(self, name)!r}, but the basis was prepared with {getattr(prepared, name)!r}"
                for name in ("direction", "rank_tol", "rank_drop")
                if getattr(self, name) != getattr(prepared, name)
            ),
        )

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        return joint_basis_cost(shape, num_tasks, rank, self.direction)

    @override
    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        return joint_basis_side(shape, num_tasks, rank, self.direction)

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop)
        factors = self._fuse(basis, coefficients, basis.rows[0])
        del basis  # the other rows
        return factors.dense()

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        basis = JointBasis.of(deltas, self.direction, self.rank_tol, self.rank_drop)
        return self._fuse(basis, coefficients, basis.rows[0])

    def _fuse(self, basis: JointBasis, coefficients: Sequence[float], out: Tensor) -> LowRank:
        """Steps 4 to 7; `out` takes the outcome P, as for `WeighedRows.merged`."""
        rows = self._rows(basis)
        return rows.merged(
            self._limits(rows),
            coefficients,
            scale=self.scale,
            out=out,
            elect_sign=self.elect_sign,
            disjoint=self.disjoint,
        )

    def _rows(self, basis: JointBasis) -> WeighedRows:
        return unit_rows(basis) if self.renormalize else joint_rows(basis)

    def _limits(self, rows: WeighedRows) -> tuple[float, ...]:
        """One threshold for each task, the same for all where pruning is joint."""
        num_tasks = len(rows.basis.rows)
        if self.prune == "joint":
            return thresholds(lambda: ([row] for row in rows.seen()), self.density, num_tasks=1) * num_tasks
        return thresholds(lambda: [rows.seen()], self.density, num_tasks=num_tasks)
