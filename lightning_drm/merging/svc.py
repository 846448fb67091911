r"""SVC (arXiv 2602.05536): after any merge, each direction's singular value is corrected by what the tasks have there.

Adding tasks that agree in a direction counts what they share N times, and inflates its singular value. Let the merged
delta be :math:`M = \sum_r \sigma_r u_r v_r^T`, and :math:`p_{r,t} = \lambda_t D_t^T u_r` a task's part in direction r.

1. How far M overshoots task t in direction r: :math:`s_{r,t} = \langle \sigma_r v_r, p_{r,t} \rangle / \|p_{r,t}\|^2`.
2. Its mean over tasks, none counted below α: :math:`\gamma_r = \frac{1}{N} \sum_t \max(\alpha, s_{r,t})`.
3. :math:`D = \sum_r (\sigma_r / \gamma_r)\, u_r v_r^T`.

What differs from the authors' code: it bounds :math:`\|p_{r,t}\|^2` by an absolute 1e-12; here a task without any
part in a direction, to rounding, counts as α. The paper has no coefficients; here they weigh the deltas, in the merge
and in the correction. A factor on the merged delta alone is mostly undone by the correction. Cost: the merge, an SVD of
M, and N m n products for each direction. Low-rank deltas are corrected exactly in core coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.inputs import refuse
from lightning_drm.merging.iso import IsoC, IsoCTS
from lightning_drm.merging.linalg.selection import Reduce, identity
from lightning_drm.merging.linalg.spectral import rounding_error, row_lengths, thin_svd, thin_svd_cost
from lightning_drm.merging.lines import LiNeS
from lightning_drm.merging.low_rank import Delta, LowRank, core_coordinates, densify
from lightning_drm.merging.method import Method
from lightning_drm.merging.scaling import near_one, numbers_near_one, times_power_
from lightning_drm.merging.statistics import Statistics


class SVC(Method):
    r"""Singular value calibration of what another method has merged.

    .. math:: D = \sum_r \frac{\sigma_r}{\gamma_r} u_r v_r^T, \qquad
        \gamma_r = \frac{1}{N} \sum_t
        \max\Big(\alpha, \frac{\langle \sigma_r v_r, \lambda_t D_t^T u_r \rangle}{\|\lambda_t D_t^T u_r\|^2}\Big)

    Args:
        method: The method that merges. Not Iso-C or Iso-CTS: they make all singular values equal, so that no direction
            is determined. Nor LiNeS, whose factors this would undo; it may go around this.
        alpha: Lower bound α of a task's part in the mean, above 0; 1 / N if left out.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        Two equal tasks, added, count twice what they share. The correction takes that back.

        >>> delta = torch.diag(torch.tensor([3.0, 1.0]))
        >>> from lightning_drm import TaskArithmetic
        >>> TaskArithmetic(scale=1.0).merge([delta, delta])
        tensor([[6., 0.],
                [0., 2.]])
        >>> SVC(TaskArithmetic(scale=1.0)).merge([delta, delta])
        tensor([[3., 0.],
                [0., 1.]])
    """

    def __init__(self, method: Method, alpha: float | None = None) -> None:
        problems: list[str | None] = [
            None if isinstance(method, Method) else f"method must be a merging method, got {method!r}"
        ]
        if isinstance(method, IsoC | IsoCTS):
            problems.append(f"method must leave singular values apart, which {type(method).__name__} makes equal")
        if isinstance(method, LiNeS):
            problems.append("method must not be LiNeS, whose factors SVC would undo; LiNeS goes around SVC")
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            problems.append(f"alpha must be a number above 0, got {alpha!r}")
        refuse("SVC", problems)
        self.method = method
        self.alpha = alpha
        self.scale = 1.0  # the correction would undo another
        self._take_after(method)

    @override
    def calibrate(
        self,
        stream: Callable[[], Iterable[Sequence[Delta]]],
        *,
        reduce: Reduce = identity,
        num_tasks: int | None = None,
    ) -> Self:
        return self._with(method=self.method.calibrate(stream, reduce=reduce, num_tasks=num_tasks))

    @override
    def keyed(self, keys: Sequence[str], *, start: int = 0) -> Self:
        return self._with(method=self.method.keyed(keys, start=start))

    @override
    def informed(self, statistics: Sequence[Statistics]) -> Self:
        return super().informed(statistics)._with(method=self.method.informed(statistics))

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        rows, columns = shape if rank is None else (min(rank, side) for side in shape)
        products = 2.0 * num_tasks * rows * columns * min(rows, columns)
        return self.method.cost(shape, num_tasks, rank) + thin_svd_cost((rows, columns)) + products

    @override
    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        return max(super().square_side(shape, num_tasks, rank), self.method.square_side(shape, num_tasks, rank))

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        numbers, own = numbers_near_one(coefficients)
        scaled, exponent = near_one(deltas)
        merged = times_power_(self.method._merge(deltas, numbers), -exponent)
        left, right = self._corrected(merged, [densify(delta) for delta in scaled], numbers)
        return times_power_(left @ right, exponent + own)

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        numbers, own = numbers_near_one(coefficients)
        scaled, exponent = near_one(deltas)
        merged, of_merged = near_one([self.method._merge_low_rank(deltas, numbers)])
        Q, W, cores = core_coordinates([delta for delta in [*scaled, *merged] if isinstance(delta, LowRank)])
        left, right = self._corrected(times_power_(cores[-1], of_merged - exponent), cores[:-1], numbers)
        return LowRank(Q @ left, times_power_(right, exponent + own) @ W.T).to(deltas[0].dtype)

    def _corrected(
        self, merged: Tensor, deltas: Sequence[Tensor], coefficients: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Steps 1 to 3, in any pair of orthonormal bases: the corrected delta as two factors."""
        alpha = 1 / len(deltas) if self.alpha is None else self.alpha
        U, S, Vh = thin_svd(merged)
        rows = S[:, None] * Vh
        mean = torch.zeros_like(S)
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            part = (U.T @ delta).mul_(coefficient)
            squares = part.square().sum(1)
            noise = abs(coefficient) * rounding_error(row_lengths(delta), delta.dtype)
            overshoot = (rows * part).sum(1) / squares
            mean += torch.where(squares > noise**2, overshoot, 0.0).clamp_(min=alpha) / len(deltas)
        return U / mean, rows
