r"""RegMean (arXiv 2212.09849): the weight whose outputs are closest to each task's own, on that task's inputs.

A linear layer of task t maps its inputs :math:`X_t` (rows) to :math:`X_t W_t^T`. The merged weight minimizes
:math:`\sum_t \|X_t (W - W_t)^T\|^2`, a regression with a closed solution. The base cancels, so deltas do as well:

1. :math:`G_t = X_t^T X_t / \mathrm{rows}`, the Gram matrix of the task's inputs;
2. shrunk towards its diagonal: :math:`\tilde G_t = \alpha G_t + (1 - \alpha)\,\mathrm{diag}(G_t)`;
3. :math:`D = \big(\sum_t \lambda_t D_t \tilde G_t\big) S^{-1}`, with :math:`S = \sum_t \lambda_t \tilde G_t`.

What differs from the published code: where no task ever uses an input (a dead ReLU, a constant pixel), S is singular,
and the published code fails. Here step 3 is solved around the weighted mean M of the deltas,

.. math:: D = M + \Big(\sum_t \lambda_t (D_t - M) \tilde G_t\Big) S^+,

which is the same where S is invertible and keeps the mean where nothing is known. Coefficients are weights, as in the
published code: a factor on all of them changes nothing.

Cost: 2 N m n² products and one solve of size n; an eigenproblem in place of it for α = 1, where S may be singular.
Low-rank deltas are merged exactly, in coordinates of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.inputs import fraction, refuse, weights
from lightning_drm.merging.linalg.normal_equations import solve_cost, solve_definite, solve_least_norm
from lightning_drm.merging.low_rank import LowRank, densify, row_coordinates
from lightning_drm.merging.method import Method
from lightning_drm.merging.scaling import near_one, times_power_
from lightning_drm.merging.statistics import Need

DEFINITE = 1e-6
"""From this 1 - α on, the shrunk Gram matrix is safely definite on the inputs that are used."""


class RegMean(Method):
    r"""Regression mean: least squares over the inputs of all tasks' layers.

    .. math:: D = M + \Big(\sum_t \lambda_t (D_t - M) \tilde G_t\Big) \Big(\sum_t \lambda_t \tilde G_t\Big)^+,
        \qquad \tilde G_t = \alpha G_t + (1 - \alpha)\,\mathrm{diag}(G_t),
        \qquad M = \frac{\sum_t \lambda_t D_t}{\sum_t \lambda_t}

    It needs the Gram matrices of the layers' inputs (``statistics: [gram]``).

    Args:
        alpha: Share α of the off-diagonal entries that is kept, in [0, 1].
        num_samples: How many training samples of each task the statistics are taken from.
        propagate: RegMean++ (arXiv 2508.03121): take the inputs of each block from the merged blocks before it. This
            needs the tasks' data at the merge.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        Each task has its way on the input that it uses alone; where both use one, they meet.

        >>> from lightning_drm import Statistics
        >>> inputs = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 3.0])]
        >>> statistics = [Statistics(gram=torch.diag(squares)) for squares in inputs]
        >>> RegMean().merge([torch.full((1, 3), 4.0), torch.full((1, 3), 8.0)], statistics=statistics)
        tensor([[4., 8., 7.]])
    """

    needs: Need | None = "gram"
    num_samples: int | None
    acts_on_inputs: bool = True
    weighs: bool = True

    def __init__(self, alpha: float = 0.95, num_samples: int = 256, propagate: bool = False) -> None:
        few = f"num_samples must be 1 or more, got {num_samples!r}" if num_samples < 1 else None
        refuse("RegMean", [fraction("alpha", alpha, zero=True, one=True), few])
        self.alpha = alpha
        self.num_samples = num_samples
        self.propagate = propagate
        self.scale = 1.0

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        rows, columns = shape if rank is None else (min(rank, shape[0]), shape[1])
        products = 2.0 * (num_tasks + 1) * rows * columns**2
        return super().cost(shape, num_tasks, rank) + products + solve_cost(columns, rows, definite=self._definite)

    @override
    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        return shape[1]

    @property
    def _definite(self) -> bool:
        return 1 - self.alpha >= DEFINITE

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        scaled, exponent = near_one(deltas)
        merged = self._regression([densify(delta) for delta in scaled], weights("RegMean", coefficients))
        return times_power_(merged, exponent).to(deltas[0].dtype)

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        scaled, exponent = near_one(deltas)
        Q, rows = row_coordinates([delta for delta in scaled if isinstance(delta, LowRank)])
        merged = self._regression(rows, weights("RegMean", coefficients))
        return LowRank(Q, times_power_(merged, exponent)).to(deltas[0].dtype)

    def _regression(self, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        """Steps 2 and 3, for deltas or their coordinates in an orthonormal basis of their columns; in float64."""
        mean = torch.zeros_like(deltas[0], dtype=torch.float64)
        for delta, coefficient in zip(deltas, coefficients, strict=True):
            mean.add_(delta, alpha=coefficient)
        missed = torch.zeros_like(mean)
        system = mean.new_zeros(mean.shape[1], mean.shape[1])
        largest = max(float(one.gram.diagonal().max()) for one in self._statistics if one.gram is not None) or 1.0
        for delta, coefficient, one in zip(deltas, coefficients, self._statistics, strict=True):
            assert one.gram is not None, "checked before"
            shrunk = one.gram.double() * (self.alpha * coefficient / largest)
            shrunk.diagonal().add_(one.gram.diagonal(), alpha=(1 - self.alpha) * coefficient / largest)
            missed += (delta.double() - mean) @ shrunk
            system += shrunk
        if not self._definite:
            return mean + solve_least_norm(missed, system)
        # With a diagonal of ones no eigenvalue is below 1 - α, whatever the inputs' sizes.
        lengths = system.diagonal().sqrt()
        over = torch.where(lengths > 0, 1 / lengths, 0.0)
        system.mul_(over).mul_(over[:, None]).diagonal().fill_(1.0)
        return mean + solve_definite(missed * over, system) * over
