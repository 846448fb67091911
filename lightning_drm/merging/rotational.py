"""Methods that use nothing but singular vectors and values, and so commute with rotations of rows and of columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.linalg.spectral import thin_svd_cost
from lightning_drm.merging.low_rank import LowRank, core_coordinates
from lightning_drm.merging.method import Method


class RotationalMethod(Method):
    r"""A matrix method that commutes with rotations.

    .. math:: \mathrm{merge}(Q K_1 W^T, …, Q K_N W^T) = Q\, \mathrm{merge}(K_1, …, K_N)\, W^T

    This holds for all Q and W with orthonormal columns. So low-rank deltas are merged exactly as their small cores
    :math:`K_t` (Σ rank × Σ rank).
    """

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        rows, columns = shape if rank is None else (min(rank, side) for side in shape)
        product = rows * columns * min(rows, columns)
        return (
            super().cost(shape, num_tasks, rank) + self._num_svds(num_tasks) * thin_svd_cost((rows, columns)) + product
        )

    @abstractmethod
    def _num_svds(self, num_tasks: int) -> int:
        """About how many matrices of the deltas' shape are decomposed."""

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return self._merge_rotated(deltas, coefficients, min(deltas[0].shape))

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        Q, W, cores = core_coordinates(deltas)
        core = self._merge_rotated(cores, coefficients, min(deltas[0].shape))
        return LowRank(Q, core @ W.T).to(deltas[0].dtype)

    @abstractmethod
    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], size: int) -> Tensor:
        """Merge matrices in any pair of orthonormal bases.

        Args:
            deltas: N matrices of one shape: the deltas, or their cores.
            coefficients: N numbers λ.
            size: min(m, n) of the deltas that these are or stand for: numbers of directions are fractions of it.

        Returns:
            The merged matrix, in the same precision.
        """
