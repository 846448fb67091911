"""Decompositions through the Gram matrix of the shorter side.

A method that needs the singular vectors of a long stack `S` (k × L, k ≪ L) never has to decompose it: `S Sᵀ` is only
k × k, and its eigenvectors are the left singular vectors. Squaring costs half of the digits, so the Gram matrix is
accumulated in float64 even where the data are float32: that resolves singular values down to 1e-8 of the largest, which
no float32 SVD does. Where float64 data need directions below 1e-4, a real SVD takes over.

Cost: one product of k² L, of which the half above the diagonal is skipped, and one symmetric eigenproblem of size k,
against about 20 k² L for the SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STRIP = 384  # rows of a Gram matrix computed at once: large enough for full BLAS speed, small enough to skip half
LENGTH = 4096  # columns converted to float64 at once, which bounds the extra memory
GRAM_RESOLUTION = 1e-4  # share of the largest singular value from which a Gram matrix rivals an SVD in float64


def gram(matrices: Iterable[Tensor]) -> Tensor:
    """Sum of A Aᵀ over matrices of k rows, at least one.

    Args:
        matrices: Matrices of shape (k, L); L may differ. Transposed views are as good as any.

    Returns:
        The lower triangle of a float64 matrix (k, k), in strips: what lies far above the diagonal stays zero.
    """
    total: Tensor | None = None
    for matrix in matrices:
        if total is None:
            total = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
        for columns in torch.split(matrix, LENGTH, dim=1):
            block = columns.double()
            for start in range(0, len(total), STRIP):
                stop = min(start + STRIP, len(total))
                total[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
    assert total is not None
    return total


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a positive semidefinite matrix, the largest first.

    Divide-and-conquer fails on rare inputs, differently on every device, so there is a ladder: the device's solver,
    the CPU's, and last an SVD, which for such a matrix is the same thing.

    Args:
        matrix: Matrix of shape (k, k), of which only the lower triangle is read.

    Returns:
        Eigenvalues (k,), none below zero, and eigenvectors in the columns of a (k, k) matrix.

    Raises:
        ArithmeticError: If no solver converges, or the input is not finite.
    """
    for solve in _SOLVERS:
        try:
            values, vectors = solve(matrix)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing from torch's stubs
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.clamp(min=0).to(matrix.device), vectors.to(matrix.device)
    raise ArithmeticError(f"no eigensolver converged on a {tuple(matrix.shape)} Gram matrix")


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _eigh_cpu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _eigh(matrix.cpu())


def _svd_symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    lower = matrix.cpu().tril()
    vectors, values, _ = torch.linalg.svd(lower + lower.tril(-1).T)
    return values, vectors


_SOLVERS: tuple[Callable[[Tensor], tuple[Tensor, Tensor]], ...] = (_eigh, _eigh_cpu, _svd_symmetric)


def eigen_cost(size: int) -> float:
    """Operations that `eigen` of a (size, size) matrix is worth on one core; measured, since few of them are BLAS-3."""
    return 9.0 * size**3


def thin_svd_cost(shape: tuple[int, int]) -> float:
    """Operations of `thin_svd`: half a Gram matrix, its eigenvectors, and the other side's vectors."""
    short, long = sorted(shape)
    return 3.0 * short**2 * long + eigen_cost(short)


def rank_tolerance(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> float:
    """Share of the largest singular value below which a direction of such a matrix is rounding noise.

    Rounding every entry perturbs the spectrum by about eps · √max(m, n) of the typical entry, not by the
    eps · max(m, n) that worst-case bounds give; the latter would cut real directions of large float32 matrices.
    """
    return torch.finfo(dtype).eps * max(8.0, math.sqrt(max(shape)))


def rounding_error(matrix: Tensor) -> float:
    """Length up to which a projection of `matrix` on a computed basis is nothing but rounding error.

    A singular vector is off by the precision over the relative gap to its neighbours, hence the power: 6e-6 of the norm
    in float32, 2e-12 in float64.
    """
    return float(torch.finfo(matrix.dtype).eps ** 0.75 * torch.linalg.vector_norm(matrix))


def needs_svd(dtype: torch.dtype, smallest: float, largest: float) -> bool:
    """Whether singular values in this range are beyond the Gram matrix of data of this precision."""
    return dtype == torch.float64 and smallest < GRAM_RESOLUTION * largest


def thin_svd(matrix: Tensor, num_directions: int | None = None, *, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets up to the numerical rank, the largest first.

    Args:
        matrix: Matrix of shape (m, n), float32 or float64.
        num_directions: Largest number of triplets to return; default all.
        floor: Singular values up to this are noise too: the rounding error of what `matrix` was computed from.

    Returns:
        U (m, r), S (r,) and Vᵀ (r, n) in the matrix's precision, with r at most the numerical rank: no null vectors,
        which no decomposition determines.
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = thin_svd(matrix.T, num_directions, floor=floor)
        return Uh.T, S, V.T
    values, U = eigen(gram([matrix]))
    S = values.sqrt()
    largest = float(S[:1].sum())  # of a matrix without rows, 0
    noise = max(floor, rank_tolerance(matrix.shape, matrix.dtype) * largest)
    wanted = slice(0, num_directions)
    if needs_svd(matrix.dtype, max(noise, float(S[wanted][-1:].sum())), largest):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = int((noise < S[wanted]).sum())
        return U[:, :rank], S[:rank], Vh[:rank]
    rank = int((noise < S[wanted]).sum())
    U, S = U[:, :rank].contiguous(), S[:rank]  # a view would keep all eigenvectors alive
    Vh = (U / S).T @ matrix.double()  # in float32, weak directions would lose their orthogonality
    return U.to(matrix.dtype), S.to(matrix.dtype), Vh.to(matrix.dtype)


def orthogonalize(basis: Tensor) -> Tensor:
    """The closest matrix with orthonormal rows or columns, whichever are fewer: the polar factor U Vᵀ.

    Args:
        basis: Matrix of shape (m, n). If it is rank deficient, its null directions stay zero.

    Returns:
        A matrix of shape (m, n), in the same precision.
    """
    U, _, Vh = thin_svd(basis)
    return U @ Vh
