r"""WUDI (arXiv 2503.08099): the delta that acts like each task's own on the inputs which that task's delta tells of.

A linear layer's delta is a sum of gradients, and so of outer products with inputs: its rows lie in the span of the
task's inputs. The rows of D_t therefore stand in for inputs of task t, and the interference is

.. math:: L(D) = \sum_t \frac{\|(D - \lambda_t D_t) D_t^T\|^2}{\|D_t\|^2}

1. :math:`G_t = D_t^T D_t / \|D_t\|^2`, a Gram matrix of trace 1; S is their sum.
2. The minimizer of :math:`L(D) + \mu \|D - A\|^2`, with the anchor :math:`A = \sum_t \lambda_t D_t`, is

   .. math:: D = \Big(\sum_t \lambda_t D_t G_t + \mu A\Big) (S + \mu I)^{-1}

What differs from the paper: it takes 300 steps of Adam from A, at a learning rate that depends on the size of the
deltas, and does not converge; here the minimum is computed. The ridge :math:`\mu = \rho\, \mathrm{tr}(S) / n` is this
package's own. It plays the part of stopping early: weak directions of S, where tasks contradict each other, stay near
the anchor. Without it (ρ = 0) D is the minimizer of least norm, :math:`Y X^+` with :math:`X = [D_t^T / \|D_t\|]_t` and
:math:`Y = [\lambda_t D_t D_t^T / \|D_t\|]_t`, singular values up to 1e-10 of the largest dropped; from X, as S would
square its condition. The paper has no coefficients; here they weigh the deltas that are to be met, so that a task with
coefficient 0 keeps the merge from acting on its inputs.

**With the inputs themselves.** Where the Gram matrices :math:`C_t = X_t^T X_t` of the layer's real inputs were
collected, they may join those of the deltas, also with a trace of 1:
:math:`G_t = D_t^T D_t / \|D_t\|^2 + \beta\, C_t / \mathrm{tr}(C_t)`. A delta stands in for the inputs that changed the
weights, a Gram matrix for all that come. One solve serves both. This is this package's own, too.

Cost: 2 N m² n + N m n² / 2 products and a Cholesky solve of size n; with inputs 2 N m n² products more. Without a ridge
it is an SVD of X, (n, N m), and with inputs an eigenproblem of size n. Low-rank deltas are merged exactly in their core
coordinates, and with inputs in those of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.inputs import at_least_zero, finite, refuse
from lightning_drm.merging.linalg.normal_equations import solve_cost, solve_definite, solve_least_norm
from lightning_drm.merging.linalg.spectral import gram, thin_svd
from lightning_drm.merging.linear import weighted_sum
from lightning_drm.merging.low_rank import LowRank, row_coordinates
from lightning_drm.merging.rotational import RotationalMethod
from lightning_drm.merging.scaling import near_one

CUT = 1e-10
"""Fraction of the largest singular value up to which directions are dropped where there is no ridge."""


class WUDI(RotationalMethod):
    r"""WUDI-Merging in closed form: the least interference with every task's own delta, held near their sum by a ridge.

    .. math:: D = \alpha \Big(\sum_t \lambda_t D_t (G_t + \mu I)\Big) \Big(\sum_t G_t + \mu I\Big)^{-1},
        \qquad G_t = \frac{D_t^T D_t}{\|D_t\|^2} + \beta \frac{C_t}{\mathrm{tr}(C_t)},
        \qquad \mu = \frac{\rho}{n} \sum_t \mathrm{tr}(G_t)

    A task whose delta is zero takes no part.

    Low-rank deltas share few directions, and where they do not meet, the minimum keeps all of each: nearly their sum,
    which is too much for many tasks. With the layers' inputs (``input_weight``) it is not; without, use a smaller
    ``scale`` for LoRA finetunes.

    Args:
        ridge: Ridge ρ, as a fraction of the mean diagonal entry of :math:`\sum_t G_t`; 0 for the exact minimizer.
        scale: Factor α on the merged delta.
        input_weight: Weight β of the layers' inputs beside the deltas. Above 0 it needs the Gram matrices :math:`C_t`
            of these inputs (``statistics: [gram]``).

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        Without a ridge, deltas on different inputs do not interfere: on the first input the result acts like the first
        task's delta, on the second like the second one's.

        >>> deltas = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])]
        >>> WUDI(ridge=0.0).merge(deltas)
        tensor([[2., 0.],
                [0., 3.]])

        On a shared input, they meet in the middle, at equal weights whatever their sizes.

        >>> WUDI(ridge=0.0).merge([torch.tensor([[2.0]]), torch.tensor([[4.0]])])
        tensor([[3.]])
    """

    acts_on_inputs: bool = True
    linear = True

    def __init__(self, ridge: float = 0.1, scale: float = 1.0, input_weight: float = 0.0) -> None:
        refuse(
            "WUDI", [at_least_zero("ridge", ridge), finite("scale", scale), at_least_zero("input_weight", input_weight)]
        )
        self.ridge = ridge
        self.scale = scale
        self.input_weight = input_weight
        if input_weight:
            self.needs = "gram"

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        rows, columns = shape if rank is None else (min(rank, side) for side in shape)
        columns = shape[1] if self.input_weight else columns
        met = 4.0 * num_tasks * rows * columns * min(rows, columns)
        if self.input_weight:
            met += 2.0 * num_tasks * rows * columns**2
        solved = num_tasks * rows * columns**2 + solve_cost(columns, rows, definite=bool(self.ridge))
        return super().cost(shape, num_tasks, rank) + met + solved

    @override
    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        return shape[1] if rank is None or self.input_weight else min(rank, shape[1])

    def _num_svds(self, num_tasks: int) -> int:
        return 0

    @override
    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        if not self.input_weight:
            return super()._merge_low_rank(deltas, coefficients)
        scaled, exponent = near_one(deltas)  # inputs are told apart by columns, so only rows may be rotated
        Q, rows = row_coordinates([delta for delta in scaled if isinstance(delta, LowRank)])
        return LowRank(Q, self._merge_scaled(rows, coefficients, deltas[0].shape, exponent)).to(deltas[0].dtype)

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        lengths = [float(torch.linalg.vector_norm(delta, dtype=torch.float64)) for delta in deltas]
        inputs = self._input_grams() if self.input_weight else [None] * len(deltas)
        tasks = [task for task in zip(deltas, lengths, coefficients, inputs, strict=True) if task[1]]
        if not tasks:
            return torch.zeros_like(deltas[0])
        if not (self.ridge or self.input_weight):
            units = [delta / length for delta, length, _, _ in tasks]
            return self.scale * _least_norm(units, [length * coefficient for _, length, coefficient, _ in tasks])
        traces = [1.0 if of_inputs is None else 1.0 + self.input_weight for _, _, _, of_inputs in tasks]
        ridge = self.ridge * sum(traces) / shape[1]
        met = ridge * weighted_sum([delta for delta, _, _, _ in tasks], [value for _, _, value, _ in tasks]).double()
        system = gram(
            (delta / length).T for delta, length, _, _ in tasks
        )  # one at a time: a copy of all would be large
        system.diagonal().add_(ridge)
        for delta, length, coefficient, of_inputs in tasks:
            met.add_(_times_own_gram(delta.double() / length), alpha=length * coefficient)
            if of_inputs is not None:
                weighed = of_inputs.double() * (self.input_weight / float(of_inputs.diagonal().double().sum()))
                met.add_(delta.double() @ weighed, alpha=coefficient)
                system += weighed
        merged = solve_definite(met, system) if self.ridge else solve_least_norm(met, system)
        return (self.scale * merged).to(deltas[0].dtype)

    def _input_grams(self) -> list[Tensor | None]:
        """By task, the Gram matrix of its inputs; ``None`` where all inputs were zero."""
        grams = [one.gram for one in self._statistics]
        return [gram if gram is not None and bool(gram.diagonal().any()) else None for gram in grams]


def _times_own_gram(matrix: Tensor) -> Tensor:
    """A Aᵀ A, by way of the smaller of A's two Gram matrices."""
    rows, columns = matrix.shape
    return (matrix @ matrix.T) @ matrix if rows <= columns else matrix @ (matrix.T @ matrix)


def _least_norm(units: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Y X⁺, with X = [U_tᵀ] and Y = [c_t U_t U_tᵀ] side by side."""
    X = torch.cat([unit.T for unit in units], dim=1)
    Y = torch.cat([target * unit @ unit.T for unit, target in zip(units, targets, strict=True)], dim=1)
    U, S, Vh = thin_svd(X)
    rank = int((CUT * S[0] < S).sum())
    return (Y @ Vh[:rank].T / S[:rank]) @ U[:, :rank].T
