r"""Deltas kept as a product of two thin factors, and the change of basis that makes merging them cheap.

A LoRA delta is `up @ down` with `rank ≪ min(m, n)`. Every method that looks at *directions* rather than at single
entries is unchanged by an orthogonal rotation of the sides it does not prune. So it may work on coordinates inside the
span of all tasks' factors, which a thin QR gives, instead of on (m, n) matrices:

.. math:: [\mathrm{up}_1 \cdots \mathrm{up}_N] = Q\, [R_1 \cdots R_N]
    \quad\Rightarrow\quad D_t = Q\, (R_t\, \mathrm{down}_t)

What is left is a problem of Σ rank rows (and, where the columns may be rotated too, Σ rank columns). Merging that and
multiplying by Q is exact, and costs O(m (Σ rank)²) instead of the dense O(m² N n). The coordinates are float64, which
costs nothing at this size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_drm.merging.linalg.spectral import thin_svd


@dataclass(frozen=True, eq=False)
class LowRank:
    r"""A matrix as the product of two factors, :math:`D = \mathrm{up} \cdot \mathrm{down}`.

    LoRA writes :math:`s B A`: `up` is :math:`s B` and `down` is A.

    Args:
        up: Left factor of shape (m, r).
        down: Right factor of shape (r, n).

    Raises:
        ValueError: If the factors are not two matrices whose inner dimensions agree.

    Example:
        >>> delta = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> delta.dense()
        tensor([[3., 4.],
                [6., 8.]])
        >>> delta.shape, delta.rank
        (torch.Size([2, 2]), 1)
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            raise ValueError(f"LowRank needs up (m, r) and down (r, n), got up {up} and down {down}")

    @property
    def shape(self) -> torch.Size:
        """Shape (m, n) of the product."""
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def rank(self) -> int:
        """Inner dimension r: an upper bound of the product's rank."""
        return self.up.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the product."""
        return torch.promote_types(self.up.dtype, self.down.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.up.device

    @property
    def T(self) -> LowRank:  # noqa: N802 - the name torch and numpy use
        """The transposed matrix, as views of the same factors."""
        return LowRank(self.down.T, self.up.T)

    def to(self, target: torch.dtype | torch.device | str) -> LowRank:
        """Both factors moved or converted, as `Tensor.to`."""
        return LowRank(self.up.to(target), self.down.to(target))

    def dense(self) -> Tensor:
        """The product, of shape (m, n)."""
        return self.up.to(self.dtype) @ self.down.to(self.dtype)

    def truncate(self, rank: int) -> tuple[LowRank, float]:
        r"""Give the closest matrix of at most `rank`, and how far away it is.

        .. math:: D = U\, \mathrm{diag}(\sigma)\, V^T \;\mapsto\;
            \mathrm{up} = U_k\, \mathrm{diag}(\sqrt{\sigma_k}), \quad
            \mathrm{down} = \mathrm{diag}(\sqrt{\sigma_k})\, V_k^T

        The factors are balanced: both carry the square root of the top k = `rank` singular values.

        Args:
            rank: Largest inner dimension of the result, at least 0.

        Returns:
            The truncated matrix, and the relative error `‖D − D_rank‖ / ‖D‖` in the Frobenius norm (0.0 for D = 0).

        Raises:
            ValueError: If `rank` is negative.

        Example:
            Of the singular values 4 and 3, the 3 is lost: the error is 3 / 5.

            >>> truncated, error = LowRank(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2)).truncate(1)
            >>> truncated.rank, round(error, 6)
            (1, 0.6)
        """
        if rank < 0:
            raise ValueError(f"rank must be at least 0, got {rank}")
        left, right, (core,) = core_coordinates([self])
        U, S, Vh = thin_svd(core)
        kept, root = min(rank, len(S)), S[:rank].sqrt()
        total = S.norm()
        error = float(S[kept:].norm() / total) if total > 0 else 0.0
        up, down = left @ (U[:, :kept] * root), (root[:, None] * Vh[:kept]) @ right.T
        return LowRank(up, down).to(self.dtype), error


@dataclass(frozen=True, eq=False)
class LowRankStack(LowRank):
    r"""E matrices of one shape, each as a product of two factors, :math:`D_e = \mathrm{up}_e \cdot \mathrm{down}_e`.

    The delta of LoRA on the experts of a layer, which live in one 3-D weight. Methods on matrices take one `matrix`
    after another, those that work entry by entry the dense tensor.

    Args:
        up: Left factors of shape (E, m, r).
        down: Right factors of shape (E, r, n).

    Raises:
        ValueError: If the factors are not two stacks of equally many matrices whose inner dimensions agree.

    Example:
        >>> stack = LowRankStack(torch.ones(3, 4, 1), torch.ones(3, 1, 2))
        >>> stack.shape, stack.matrix(0).shape
        (torch.Size([3, 4, 2]), torch.Size([4, 2]))
    """

    def __post_init__(self) -> None:
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) != 3 or len(down) != 3 or up[0] != down[0] or up[2] != down[1]:
            raise ValueError(f"LowRankStack needs up (E, m, r) and down (E, r, n), got up {up} and down {down}")

    @property
    def shape(self) -> torch.Size:
        """Shape (E, m, n) of the products."""
        return torch.Size((*self.up.shape[:2], self.down.shape[2]))

    @property
    def rank(self) -> int:
        """Inner dimension r of each product."""
        return self.up.shape[2]

    @property
    def T(self) -> LowRankStack:  # noqa: N802 - the name torch and numpy use
        """Each matrix transposed, as views of the same factors."""
        return LowRankStack(self.down.mT, self.up.mT)

    def to(self, target: torch.dtype | torch.device | str) -> LowRankStack:
        """Both factors moved or converted, as `Tensor.to`."""
        return LowRankStack(self.up.to(target), self.down.to(target))

    def truncate(self, rank: int) -> tuple[LowRank, float]:
        """Refused: each matrix has a closest one of its own; truncate these."""
        raise ValueError("a stack is not truncated as a whole; truncate each matrix")

    def matrix(self, index: int) -> LowRank:
        """One of the products, as views of the same factors."""
        return LowRank(self.up[index], self.down[index])


Delta: TypeAlias = Tensor | LowRank
"""One task's change of one parameter: finetuned minus base."""


def densify(delta: Delta) -> Tensor:
    """The delta as a tensor."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def rows_of(delta: Delta, rows: slice) -> Delta:
    """Some rows of a delta, as views; of a stack, some of its matrices."""
    if isinstance(delta, LowRankStack):
        return LowRankStack(delta.up[rows], delta.down[rows])
    return LowRank(delta.up[rows], delta.down) if isinstance(delta, LowRank) else delta[rows]


def row_coordinates(deltas: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """Write every delta in one orthonormal basis of all their columns.

    Args:
        deltas: N matrices of one shape (m, n).

    Returns:
        Q of shape (m, R) with orthonormal columns, R = min(m, Σ rank), and N coordinate matrices C_t of shape (R, n)
        with D_t = Q C_t; all in float64.
    """
    Q, R = torch.linalg.qr(torch.cat([delta.up for delta in deltas], dim=1).double())
    columns = R.split([delta.rank for delta in deltas], dim=1)
    return Q, [part @ delta.down.double() for part, delta in zip(columns, deltas, strict=True)]


def core_coordinates(deltas: Sequence[LowRank]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Write every delta in one orthonormal basis of all their columns and one of all their rows.

    Args:
        deltas: N matrices of one shape (m, n).

    Returns:
        Q of shape (m, R), W of shape (n, R') with orthonormal columns, and N cores K_t of shape (R, R') with
        D_t = Q K_t Wᵀ; all in float64.
    """
    Q, left = torch.linalg.qr(torch.cat([delta.up for delta in deltas], dim=1).double())
    W, right = torch.linalg.qr(torch.cat([delta.down for delta in deltas], dim=0).T.double())
    ranks = [delta.rank for delta in deltas]
    return Q, W, [a @ b.T for a, b in zip(left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True)]
