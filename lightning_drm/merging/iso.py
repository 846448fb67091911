"""Isotropic merging (arXiv 2502.04959): give every merged direction the same weight.

Iso-C (Algorithm 1) flattens the spectrum of the summed deltas. Iso-CTS (Algorithm 2) keeps a common subspace of the
sum, fills the rest with each task's own strongest directions, orthogonalizes, and flattens. All decompositions go
through the Gram matrix of the shorter side, so Iso-C costs one product, one symmetric eigenproblem and the polar
factor.

Unlike in the published code, null directions take no part: that code fills a rank-deficient matrix with whatever null
vectors the SVD returns, and counts their zeros in the mean. The paper has no coefficients; here they weigh the deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drm.merging.inputs import finite, fraction, refuse
from lightning_drm.merging.linalg.polar import orthogonalize, polar
from lightning_drm.merging.linalg.spectral import Triplets, join, rounding_error, row_lengths, thin_svd
from lightning_drm.merging.linear import weighted_sum
from lightning_drm.merging.rotational import RotationalMethod


class IsoC(RotationalMethod):
    r"""Isotropic merging in the common subspace: the summed deltas with every singular value replaced by their mean.

    .. math:: M = \sum_t \lambda_t D_t = U\, \mathrm{diag}(\sigma)\, V^T, \qquad
        D = \alpha \bar\sigma U V^T, \qquad \bar\sigma = \frac{1}{r} \sum_{i=1}^r \sigma_i

    Args:
        scale: Factor α on the merged delta.

    Raises:
        ValueError: If `scale` is not finite.

    Example:
        The singular values 3 and 1 have the mean 2.

        >>> IsoC().merge([torch.diag(torch.tensor([3.0, 1.0]))])
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(self, scale: float = 1.0) -> None:
        refuse("IsoC", [finite("scale", scale)])
        self.scale = scale

    def _num_svds(self, num_tasks: int) -> int:
        return 1

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        factor, mean = polar(weighted_sum(deltas, coefficients))
        return factor.mul_(self.scale * mean)


class IsoCTS(RotationalMethod):
    r"""Isotropic merging in common and task-specific subspaces.

    Of :math:`M = \sum_t \lambda_t D_t` it takes the top k singular triplets, and of each task the top
    :math:`(\min(m, n) - k) / N` of what lies outside of their left space:

    .. math:: \bar D_t = \lambda_t (D_t - U_k U_k^T D_t)

    With all left vectors side by side in :math:`U_*`, all right ones in :math:`V_*` and all singular values in
    :math:`\sigma`, and with polar(B) the closest orthonormal basis to B (see `orthogonalize`):

    .. math:: D = \alpha \bar\sigma\, \mathrm{polar}(U_*)\, \mathrm{polar}(V_*)^T

    Args:
        common_fraction: Fraction of the directions that come from the summed deltas, in [0, 1]: it sets k. The rest is
            rounded so that every task gets the same number.
        scale: Factor α on the merged delta.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        With no common directions, each of the two tasks gives its strongest one, of singular values 3 and 1.

        >>> deltas = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> IsoCTS(common_fraction=0.0).merge(deltas)
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(self, common_fraction: float = 0.8, scale: float = 1.0) -> None:
        refuse("IsoCTS", [fraction("common_fraction", common_fraction, zero=True, one=True), finite("scale", scale)])
        self.common_fraction = common_fraction
        self.scale = scale

    def _num_svds(self, num_tasks: int) -> int:
        return num_tasks + 3  # the sum, each task's rest, and the two bases that are made orthogonal

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        left, values, right = join(self._triplets(deltas, coefficients, min(shape)))
        mean = values.mean() if len(values) else 0.0
        return mean * self.scale * orthogonalize(left) @ orthogonalize(right)

    def _triplets(self, deltas: Sequence[Tensor], coefficients: Sequence[float], size: int) -> list[Triplets]:
        """Each task's own directions, and last the common ones."""
        num_own = round((size - int(size * self.common_fraction)) / len(deltas))
        num_own = min(num_own, size // len(deltas))  # rounding up must not leave less than nothing for the common part
        U, S, Vh = thin_svd(weighted_sum(deltas, coefficients), size - num_own * len(deltas))
        own = []
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            rest = torch.addmm(delta, U, U.T @ delta, alpha=-1)
            floor = abs(coefficient) * rounding_error(row_lengths(delta), delta.dtype)
            own.append(thin_svd(rest.mul_(coefficient), num_own, floor=floor))
        return [*own, (U, S, Vh)]
