"""Decompositions through the Gram matrix of the shorter side.

A method that needs the singular vectors of a long stack `S` (k × L, k ≪ L) never has to decompose it: `S Sᵀ` is only
k × k, and its eigenvectors are the left singular vectors. Squaring costs half of the digits, so the Gram matrix is
accumulated in float64 even where the data are float32: singular values are then resolved down to 1e-8 of the largest,
well below what a float32 SVD resolves. Where float64 data ask for more than that, a real SVD takes over.

Cost: one product of k² L, of which the half above the diagonal is skipped, and one symmetric eigenproblem of size k,
against about 20 k² L for the SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STRIP = 384  # rows of a Gram matrix computed at once: large enough for full BLAS speed, small enough to skip half
COLUMNS = 4096  # columns converted to float64 at once, which bounds the extra memory
GRAM_RESOLUTION = 1e-6  # singular values below this share of the largest are lost in a float64 Gram matrix


def add_gram(gram: Tensor, matrix: Tensor) -> None:
    """Add the lower triangle of `matrix @ matrix.T` to `gram`, in place.

    Args:
        gram: Float64 accumulator of shape (k, k). What lies above its diagonal blocks is not touched.
        matrix: Matrix of shape (k, L) in any real precision.
    """
    for columns in torch.split(matrix, COLUMNS, dim=1):
        block = columns.double()
        for start in range(0, len(gram), STRIP):
            stop = min(start + STRIP, len(gram))
            gram[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)


def gram_of(matrices: Iterable[Tensor], size: int, device: torch.device) -> Tensor:
    """Σ A Aᵀ over `matrices` of `size` rows: float64, lower triangle only."""
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    for matrix in matrices:
        add_gram(gram, matrix)
    return gram


def eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a positive semidefinite matrix, the largest first.

    Divide-and-conquer fails on rare inputs, differently on every device, so there is a ladder: the device's solver,
    the CPU's, and last an SVD, which for such a matrix is the same thing.

    Args:
        gram: Matrix of shape (k, k), of which only the lower triangle is read.

    Returns:
        Eigenvalues (k,), none below zero, and eigenvectors in the columns of a (k, k) matrix.

    Raises:
        ArithmeticError: If no solver converges, or the input is not finite.
    """
    for solve in _SOLVERS:
        try:
            values, vectors = solve(gram)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing from torch's stubs
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.clamp(min=0).to(gram.device), vectors.to(gram.device)
    raise ArithmeticError(f"no eigensolver converged on a {tuple(gram.shape)} Gram matrix")


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def _eigh_cpu(gram: Tensor) -> tuple[Tensor, Tensor]:
    return _eigh(gram.cpu())


def _svd_symmetric(gram: Tensor) -> tuple[Tensor, Tensor]:
    lower = gram.cpu().tril()
    vectors, values, _ = torch.linalg.svd(lower + lower.tril(-1).T)
    return values, vectors


_SOLVERS: tuple[Callable[[Tensor], tuple[Tensor, Tensor]], ...] = (_eigh, _eigh_cpu, _svd_symmetric)


def rank_tolerance(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> float:
    """Share of the largest singular value below which a direction of such a matrix is rounding noise.

    Rounding every entry perturbs the spectrum by about eps · √max(m, n) of the typical entry, not by the
    eps · max(m, n) that worst-case bounds give; the latter would cut real directions of large float32 matrices.
    """
    return torch.finfo(dtype).eps * max(8.0, math.sqrt(max(shape, default=1)))


def thin_svd(matrix: Tensor, num_directions: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets up to the numerical rank, the largest first.

    Args:
        matrix: Matrix of shape (m, n), float32 or float64.
        num_directions: Largest number of triplets to return; default all.

    Returns:
        U (m, r), S (r,) and Vᵀ (r, n) in float64, with r at most the numerical rank: no null vectors, which no
        decomposition determines.
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = thin_svd(matrix.T, num_directions)
        return Uh.T, S, V.T
    values, vectors = eigen(gram_of([matrix], len(matrix), matrix.device))
    S = values.sqrt()
    tolerance = rank_tolerance(matrix.shape, matrix.dtype)
    limit = len(S) if num_directions is None else min(num_directions, len(S))
    if tolerance < GRAM_RESOLUTION and limit and float(S[limit - 1]) < GRAM_RESOLUTION * float(S[0]):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = min(limit, int((tolerance * S[0] < S).sum()))
        return U[:, :rank], S[:rank], Vh[:rank]
    rank = min(limit, int((tolerance * S[0] < S).sum())) if len(S) else 0
    U, S = vectors[:, :rank], S[:rank]
    return U, S, (U / S).T @ matrix.double()


def orthogonalize(basis: Tensor) -> Tensor:
    """The closest matrix with orthonormal rows or columns, whichever are fewer: the polar factor U Vᵀ.

    Args:
        basis: Matrix of shape (m, n). If it is rank deficient, its null directions stay zero.

    Returns:
        A matrix of shape (m, n), float64.
    """
    U, _, Vh = thin_svd(basis)
    return U @ Vh
