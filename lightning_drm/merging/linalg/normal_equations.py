r"""Solving :math:`D S = R` for D, with a symmetric positive semidefinite S: what least squares over rows leads to.

Cost: a Cholesky decomposition of size n, :math:`n^3 / 3`, where S is safely definite; else an eigenproblem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_drm.merging.linalg.eigen import eigen, eigen_cost

CUT = 1e-10
"""Fraction of the largest eigenvalue up to which a direction counts as one that no row has."""


def solve_definite(right: Tensor, system: Tensor) -> Tensor:
    """R S⁻¹ for a positive definite S.

    Args:
        right: R, (m, n), float64.
        system: S, (n, n), float64; only its upper triangle is read.

    Example:
        >>> solve_definite(torch.ones(1, 2).double(), torch.diag(torch.tensor([2.0, 4.0])).double())
        tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(system, upper=True), upper=True).T


def solve_least_norm(right: Tensor, system: Tensor) -> Tensor:
    """R S⁺: of all solutions the one of least norm.

    Args:
        right: R, (m, n), float64, with rows in the span of S.
        system: S, (n, n), float64; only its upper triangle is read.

    Example:
        >>> solve_least_norm(torch.tensor([[3.0, 0.0]]).double(), torch.diag(torch.tensor([2.0, 0.0])).double())
        tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    values, vectors = eigen(system.clone)
    rank = int((values > CUT * values[0]).sum())
    basis = vectors[:, :rank]
    return (right @ basis / values[:rank]) @ basis.T


def solve_cost(size: int, num_rows: int, *, definite: bool) -> float:
    """Operations of one solve, in the unit of `Method.cost`."""
    return 2.0 * num_rows * size**2 + (size**3 / 3 if definite else eigen_cost(size) + 2.0 * num_rows * size**2)
