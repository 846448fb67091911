"""Methods that use nothing but singular vectors and values, and so commute with rotations of rows and of columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.linalg.spectral import thin_svd_cost
from lightning_drm.merging.low_rank import LowRank, core_coordinates, densify
from lightning_drm.merging.method import Method
from lightning_drm.merging.scaling import near_one, numbers_near_one, times_power_


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
        scaled, exponent = near_one(deltas)
        return self._merge_scaled([densify(delta) for delta in scaled], coefficients, deltas[0].shape, exponent)

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        scaled, exponent = near_one(deltas)
        Q, W, cores = core_coordinates([delta for delta in scaled if isinstance(delta, LowRank)])
        core = self._merge_scaled(cores, coefficients, deltas[0].shape, exponent)
        return LowRank(Q, core @ W.T).to(deltas[0].dtype)

    def _merge_scaled(
        self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...], exponent: int
    ) -> Tensor:
        """The result also scales with the coefficients, whose products with deltas are squared as well."""
        numbers, own = numbers_near_one(coefficients)
        return times_power_(self._merge_rotated(deltas, numbers, shape), exponent + own)

    @abstractmethod
    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        """Merge matrices in any pair of orthonormal bases.

        Args:
            deltas: N matrices of one shape: the deltas, or their cores.
            coefficients: N numbers λ.
            shape: (m, n) of the deltas that these are or stand for, on which numbers of directions depend.

        Returns:
            The merged matrix, in the same precision.
        """
