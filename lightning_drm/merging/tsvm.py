"""Task singular vectors (TSV-Merge, arXiv 2412.00081): give each task its own directions, then separate them.

Each task keeps its top min(m, n) / N singular triplets. Side by side the vectors of different tasks interfere;
replacing both concatenated bases by their polar factors, the closest orthonormal bases, takes the interference out.

Null directions take no part; the published code fills up with arbitrary null vectors. The paper has no coefficients of
single tasks; here they weigh the singular values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_drm.merging.inputs import finite, refuse
from lightning_drm.merging.linalg.polar import orthogonalize
from lightning_drm.merging.linalg.spectral import join, thin_svd
from lightning_drm.merging.rotational import RotationalMethod


class TSVM(RotationalMethod):
    r"""TSV-Merge: each task's top singular triplets, with all tasks' vectors made orthogonal to each other.

    With :math:`D_t \approx U_t\, \mathrm{diag}(\sigma_t)\, V_t^T` of rank :math:`\lfloor \min(m, n) / N \rfloor`, and
    polar(B) the closest orthonormal basis to B (see `orthogonalize`), Algorithm 1 is:

    .. math:: D = \alpha\, \mathrm{polar}([U_1 \cdots U_N])\,
        \mathrm{diag}(\lambda_1 \sigma_1, …, \lambda_N \sigma_N)\, \mathrm{polar}([V_1 \cdots V_N])^T

    With more tasks than min(m, n), no task has a whole direction to itself and the merged delta is zero, as in the
    published code.

    Args:
        scale: Factor α on the merged delta.

    Raises:
        ValueError: If `scale` is not finite.

    Example:
        Each of the two tasks keeps one direction: the first its 3, the second its 2.

        >>> import torch
        >>> TSVM().merge([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0]))])
        tensor([[3., 0.],
                [0., 2.]])
    """

    linear = True

    def __init__(self, scale: float = 1.0) -> None:
        refuse("TSVM", [finite("scale", scale)])
        self.scale = scale

    def _num_svds(self, num_tasks: int) -> int:
        return num_tasks + 2  # each task's, and those of the two bases that are made orthogonal

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        parts = (thin_svd(delta, min(shape) // len(deltas)) for delta in deltas)
        left, values, right = join((U, value * S, Vh) for value, (U, S, Vh) in zip(coefficients, parts, strict=True))
        return orthogonalize(left) * (self.scale * values) @ orthogonalize(right)
