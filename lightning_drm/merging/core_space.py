r"""Core space (arXiv 2509.17786): low-rank deltas as small square matrices in two bases that all tasks share.

For deltas :math:`D_t = B_t A_t` of shape (m, n), :math:`B_t` (m, r) and :math:`A_t` (r, n), with R the sum of all r:

1. U holds the left singular vectors of :math:`[B_1 \cdots B_N]`, and V the right singular vectors of
   :math:`A_1, …, A_N` on top of each other: at most R of each.
2. The core of a task is :math:`M_t = U^T B_t A_t V`, so that :math:`D_t = U M_t V^T`, exactly.
3. The entries of the cores are merged, into M, and :math:`D = U M V^T`, of rank R at most.

Methods that work with singular vectors and values alone give the same in any pair of bases (see `rotational.py`). Those
that work with entries do not: **TIES and DARE-TIES in core space are other methods than on entries**, and the singular
vectors matter, not just the spaces that they span.

What differs from the paper:

* **Factors are balanced first.** :math:`B_t` times 10 and :math:`A_t` over 10 are the same delta, but other singular
  vectors of the stacks, and core TIES then differs by half of its norm. The authors take factors as they were trained,
  without LoRA's scaling. Here :math:`D_t` is all that an adapter adds to the base, and its SVD gives
  :math:`B_t = U_t \Sigma_t^{1/2}` and :math:`A_t = \Sigma_t^{1/2} V_t^T`. So the result depends on the deltas alone,
  and U and V are the eigenvectors of :math:`\sum_t (D_t D_t^T)^{1/2}` and of :math:`\sum_t (D_t^T D_t)^{1/2}`.
* Directions that are rounding noise beside the strongest are no part of the space. The paper keeps R of them, whose
  entries are zero.

Singular vectors are determined up to their signs, which change neither magnitudes nor votes. Where singular values
coincide, they are determined no further than the space of all of them.

Cost: QR decompositions and products of (m + n) R² operations, and eigenproblems of size R; all in float64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.linalg.eigen import eigen_cost
from lightning_drm.merging.linalg.spectral import thin_svd
from lightning_drm.merging.low_rank import Delta, LowRank, densify
from lightning_drm.merging.method import COST_PER_VALUE, Method
from lightning_drm.merging.precision import ieee_arithmetic
from lightning_drm.merging.scaling import near_one, times_power_

Space = Literal["entries", "core"]


@dataclass(frozen=True, eq=False)
class CoreSpace:
    r"""N low-rank deltas as their cores, :math:`D_t = U M_t V^T`.

    Args:
        U: Orthonormal columns, shape (m, R).
        V: Orthonormal columns, shape (n, R').
        cores: The cores :math:`M_t`, N matrices of shape (R, R'). All are float64.

    Example:
        The first task has the left direction (1, 0), the second one (0, 1), and both the right direction (1, 0).

        >>> down = torch.tensor([[1.0, 0.0]])
        >>> deltas = [LowRank(torch.tensor([[4.0], [0.0]]), down), LowRank(torch.tensor([[0.0], [1.0]]), down)]
        >>> space = CoreSpace.of(deltas)
        >>> [core.abs().tolist() for core in space.cores]
        [[[4.0], [0.0]], [[0.0], [1.0]]]
        >>> space.delta(space.cores[0]).dense().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """

    U: Tensor
    V: Tensor
    cores: list[Tensor]

    @classmethod
    def of(cls, deltas: Sequence[LowRank]) -> Self:
        """The core space of deltas of one shape and precision, whatever their factors."""
        scaled, exponent = near_one(deltas)
        factors = [delta for delta in scaled if isinstance(delta, LowRank)]
        space = cls.of_factors([delta.to(torch.float64).truncate(delta.rank)[0] for delta in factors])
        for core in space.cores:
            times_power_(core, exponent)
        return space

    @classmethod
    def of_factors(cls, deltas: Sequence[LowRank]) -> Self:
        """The core space of these very factors, which the paper takes as they were trained."""
        factors = [(delta.up.double(), delta.down.double()) for delta in deltas]
        U = _left_vectors(torch.cat([up for up, _ in factors], dim=1))
        V = _left_vectors(torch.cat([down for _, down in factors], dim=0).T)
        return cls(U, V, [(U.T @ up) @ (down @ V) for up, down in factors])

    def delta(self, core: Tensor) -> LowRank:
        """The delta U M Vᵀ of a core, in float64, of rank min(R, R')."""
        if self.U.shape[1] <= self.V.shape[1]:
            return LowRank(self.U, core @ self.V.T)
        return LowRank(self.U @ core, self.V.T)


def _left_vectors(factors: Tensor) -> Tensor:
    """Left singular vectors of a matrix (m, R) up to its numerical rank, by way of the R × R problem of a tall one."""
    Q, triangle = torch.linalg.qr(factors)
    left, _, _ = thin_svd(triangle)
    return torch.mm(Q, left)


class CoreSpaceMethod(Method):
    """A method on entries, which may be those of the deltas or those of their cores.

    A subclass calls `_choose` in its `__init__` and implements `_merge_entries`. In core space it is a method on
    matrices: it takes low-rank deltas only, and its result is low-rank.
    """

    elementwise = True
    space: Space

    def _choose(self, space: Space) -> None:
        self.space = space
        if space == "core":
            self.elementwise = False
            self.not_low_rank = ""
            self.only_low_rank = "core space needs low-rank deltas, such as LoRA's"

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        if self.space == "entries" or rank is None:
            return super().cost(shape, num_tasks, rank)
        short = min(rank, *shape)
        bases = 8.0 * rank**2 * sum(shape) + 3 * eigen_cost(short)  # each task's factors, and those of all
        cores = (COST_PER_VALUE + 2.0 * rank) * num_tasks * short**2
        return super().cost(shape, num_tasks, rank) + bases + cores

    def _entries(self, deltas: Sequence[Delta]) -> list[Tensor]:
        """What is merged entry by entry: checked deltas, or their cores."""
        if self.space == "entries":
            return [densify(delta) for delta in deltas]
        with ieee_arithmetic(deltas[0].device):
            return CoreSpace.of([delta for delta in deltas if isinstance(delta, LowRank)]).cores

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return self._merge_entries(deltas, coefficients)

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        space = CoreSpace.of(deltas)
        return space.delta(self._merge_entries(space.cores, coefficients)).to(deltas[0].dtype)

    @abstractmethod
    def _merge_entries(self, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        """Merge N tensors of one shape and precision, entry by entry."""
