r"""STAR (arXiv 2502.10339): each task's strongest directions alone, rescaled, and then the mean.

1. Of each task, keep the fewest leading singular triplets that hold η percent of the nuclear norm
   :math:`\sum_i \sigma_i`.
2. Multiply what is kept by one factor, so that the nuclear norm is what it was.
3. Average the tasks.

The paper has no coefficients; here they weigh the average. Cost: an SVD of each task. Low-rank deltas are merged
exactly in their core coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drm.merging.inputs import finite, refuse
from lightning_drm.merging.linalg.spectral import thin_svd
from lightning_drm.merging.rotational import RotationalMethod


class STAR(RotationalMethod):
    r"""STAR: spectral truncation and rescaling of each task, and the mean.

    With :math:`D_t = \sum_i \sigma_i u_i v_i^T` and r the smallest number for which
    :math:`\sum_{i \le r} \sigma_i \ge \frac{\eta}{100} \sum_i \sigma_i`:

    .. math:: D = \frac{\alpha}{N} \sum_t \lambda_t
        \frac{\sum_i \sigma_i}{\sum_{i \le r} \sigma_i} \sum_{i \le r} \sigma_i u_i v_i^T

    Args:
        eta: Percentage η of each task's nuclear norm that is kept, in (0, 100].
        scale: Factor α on the merged delta.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        The larger of the singular values 3 and 1 holds more than 40 % of their sum. It is kept, and takes it all.

        >>> STAR(eta=40.0).merge([torch.diag(torch.tensor([3.0, 1.0]))])
        tensor([[4., 0.],
                [0., 0.]])
    """

    linear = True

    def __init__(self, eta: float = 40.0, scale: float = 1.0) -> None:
        wrong = None if 0 < eta <= 100 else f"eta must be a percentage in (0, 100], got {eta!r}"
        refuse("STAR", [wrong, finite("scale", scale)])
        self.eta = eta
        self.scale = scale

    def _num_svds(self, num_tasks: int) -> int:
        return num_tasks

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            U, S, Vh = thin_svd(delta)
            if not len(S):
                continue
            sums = S.double().cumsum(0)
            rank = 1 + int((sums < self.eta / 100 * sums[-1]).sum())
            factor = self.scale * coefficient / len(deltas) * float(sums[-1] / sums[rank - 1])
            total.addmm_(U[:, :rank] * S[:rank], Vh[:rank], alpha=factor)
        return total
