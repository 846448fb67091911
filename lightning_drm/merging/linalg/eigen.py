r"""Eigenvectors of a positive semidefinite matrix, from the first solver whose result holds.

Divide-and-conquer fails on rare inputs, differently on every device and not always with a word: batched solvers on GPUs
have returned orthonormal vectors of another matrix (PyTorch, issue 192483). So no solver is believed:

1. Note what the matrix A does to a random vector p.
2. Solve :math:`A = V \Lambda V^T` on the matrix's device, or on the CPU where the matrix is small.
3. Keep the result if :math:`V V^T p = p` and :math:`V \Lambda V^T p = A p`; or else try the next solver: the CPU's, and
   last an SVD, which is the same thing for such a matrix.

Cost: the solver, and a look at A and V, which is nothing beside it. No memory but the solver's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HOST_SIZE = 512  # up to which a CPU solves it sooner than an accelerator, which takes a core of LoRA deltas row by row
STRIP = 512  # rows of a matrix looked at together


def eigen(build: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of a positive semidefinite matrix, the largest first: :math:`A = V \Lambda V^T`.

    Each solver works in the matrix's own memory, and each starts from a fresh one.

    Args:
        build: Computes the float64 matrix A, of shape (k, k), of which only the upper triangle is read.

    Returns:
        Eigenvalues (k,), none below zero, and eigenvectors in the columns of a (k, k) matrix, both in float64.

    Raises:
        ArithmeticError: If no solver converges, or the input is not finite.

    Example:
        >>> values, vectors = eigen(lambda: torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
        >>> values.tolist(), vectors.abs().tolist()
        ([4.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    size, reasons = 0, []
    for solve in _SOLVERS:
        try:
            matrix = build()
            size, device = len(matrix), matrix.device
            probe = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
            image = _times(matrix, probe)
            values, vectors = (found.to(device) for found in solve(matrix))
            if _holds(values, vectors, probe, image):
                return values.clamp(min=0), vectors
            reasons.append("a wrong result")
        except RuntimeError as error:  # of a solver that does not converge, and of a device without memory left
            reasons.append(str(error).splitlines()[0])
        matrix = values = vectors = torch.empty(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise ArithmeticError(f"no eigensolver converged on a {(size, size)} Gram matrix: {'; '.join(reasons)}")


def eigen_cost(size: int) -> float:
    """Operations that `eigen` of a (size, size) matrix is worth on one core; measured, since few of them are BLAS-3."""
    return 10.0 * size**3


def _times(upper: Tensor, vector: Tensor) -> Tensor:
    """The product of a symmetric matrix and a vector, from the upper triangle, without a copy of it."""
    product = torch.zeros_like(vector)
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        corner, rest = upper[start:stop, start:stop], upper[start:stop, stop:]
        product[start:stop] += corner.triu() @ vector[start:stop] + corner.triu(1).T @ vector[start:stop]
        product[start:stop] += rest @ vector[stop:]
        product[stop:] += rest.T @ vector[start:stop]
    return product


def _holds(values: Tensor, vectors: Tensor, probe: Tensor, image: Tensor) -> bool:
    """Whether VVᵀ takes the probe to itself, and VΛVᵀ to its image; false if anything is not finite."""
    if not len(values):
        return True
    parts = vectors.T @ probe
    largest = values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
    errors = torch.stack([vectors @ parts - probe, (vectors @ (values * parts) - image) / largest])
    bound = torch.finfo(vectors.dtype).eps ** 0.75 * torch.linalg.vector_norm(probe)
    return bool((torch.linalg.vector_norm(errors, dim=1) <= bound).all())


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # Transposed, the matrix is laid out as the solver wants it. Then the input is the output too, and nothing is
    # copied: with the solver's workspace, twice the matrix's size, a copy would be the peak of a whole merge.
    columns, values = matrix.T, matrix.new_empty(len(matrix))
    torch.linalg.eigh(columns, UPLO="L", out=(values, columns))
    return values.flip(0), columns.flip(1)


def _eigh_by_size(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _eigh(matrix if len(matrix) > HOST_SIZE else matrix.cpu())


def _eigh_cpu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _eigh(matrix.cpu())


def _svd_symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    upper = matrix.cpu().triu()
    vectors, values, _ = torch.linalg.svd(upper + upper.triu(1).T)
    return values, vectors


_SOLVERS = (_eigh_by_size, _eigh_cpu, _svd_symmetric)
