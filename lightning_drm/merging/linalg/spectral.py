r"""Decompositions through the Gram matrix of the shorter side.

A method that needs the singular vectors of a long stack A (k × L, k ≪ L) never has to decompose it:

.. math:: A = U S V^T \quad\Rightarrow\quad A A^T = U S^2 U^T, \qquad V^T = S^{-1} U^T A

The Gram matrix :math:`A A^T` is only k × k. Squaring costs half of the digits, so it is accumulated in float64 even
where the data are float32: that resolves singular values down to 1e-8 of the largest, which no float32 SVD does. Where
float64 data need directions below 1e-4, a real SVD takes over.

Cost: one product of k² L, of which the half below the diagonal is skipped, and one symmetric eigenproblem of size k,
against about 20 k² L for the SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # documented, not in its __all__

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Left singular vectors U (m, r), singular values S (r,), right singular vectors Vᵀ (r, n)."""

TILE = (768, 384)  # of a Gram matrix, computed at once: enough for full BLAS speed, and its buffers stay small
CACHED = 1 << 16  # entries of float64 that stay in a CPU's cache
LENGTH = 4096  # columns converted to float64 at once, which bounds the extra memory
GRAM_RESOLUTION = 1e-4  # fraction of the largest singular value from which a Gram matrix rivals an SVD in float64


def gram(matrices: Iterable[Tensor]) -> Tensor:
    r"""Gram matrix :math:`\sum_t A_t A_t^T` of matrices of k rows, at least one.

    Args:
        matrices: Matrices of shape (k, L); L may differ. Transposed views are as good as any.

    Returns:
        The upper triangle of a float64 matrix (k, k), in tiles: what lies far below the diagonal stays zero.

    Example:
        >>> gram([torch.tensor([[1.0, 2.0], [0.0, 1.0]])]).triu()
        tensor([[5., 2.],
                [0., 1.]], dtype=torch.float64)
    """
    total: Tensor | None = None
    for matrix in matrices:
        if total is None:
            total = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
        for part in torch.split(matrix, LENGTH, dim=1):
            block = part.double()
            for left in range(0, len(total), TILE[1]):
                columns = slice(left, left + TILE[1])
                for top in range(0, left + TILE[1], TILE[0]):
                    rows = slice(top, min(top + TILE[0], left + TILE[1]))
                    total[rows, columns].addmm_(block[rows], block[columns].T)
            del block  # before the next one is made
    assert total is not None
    return total


def eigen(build: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of a positive semidefinite matrix, the largest first: :math:`A = V \Lambda V^T`.

    Divide-and-conquer fails on rare inputs, differently on every device and not always with a word, so there is a
    ladder: the solver of the matrix's device, the CPU's, and last an SVD, which for such a matrix is the same thing.
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
    for solve in _SOLVERS:
        matrix = build()
        size, device = len(matrix), matrix.device
        try:
            values, vectors = solve(matrix)
        except LinAlgError:
            continue
        if bool(values.isfinite().all()) and _is_orthonormal(vectors):
            return values.clamp(min=0).to(device), vectors.to(device)
    raise ArithmeticError(f"no eigensolver converged on a {(size, size)} Gram matrix")


def _is_orthonormal(vectors: Tensor) -> bool:
    """Whether VᵀV takes a vector to itself, which costs as little as a look at V; false if V is not finite.

    Batched solvers on GPUs have returned vectors that are not (PyTorch, issue 192483).
    """
    probe = torch.randn(vectors.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probe = probe.to(vectors.device)
    change = torch.linalg.vector_norm(vectors.T @ (vectors @ probe) - probe)
    return bool(change <= torch.finfo(vectors.dtype).eps ** 0.5 * torch.linalg.vector_norm(probe))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # Transposed, the matrix is laid out as the solver wants it. Then the input is the output too, and nothing is
    # copied: with the solver's workspace, twice the matrix's size, a copy would be the peak of a whole merge.
    columns, values = matrix.T, matrix.new_empty(len(matrix))
    torch.linalg.eigh(columns, UPLO="L", out=(values, columns))
    return values.flip(0), columns.flip(1)


def _eigh_cpu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _eigh(matrix.cpu())


def _svd_symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    upper = matrix.cpu().triu()
    vectors, values, _ = torch.linalg.svd(upper + upper.triu(1).T)
    return values, vectors


_SOLVERS = (_eigh, _eigh_cpu, _svd_symmetric)


def eigen_cost(size: int) -> float:
    """Operations that `eigen` of a (size, size) matrix is worth on one core; measured, since few of them are BLAS-3."""
    return 10.0 * size**3


def thin_svd_cost(shape: tuple[int, int]) -> float:
    """Operations of `thin_svd`: half a Gram matrix, its eigenvectors, and the other side's vectors."""
    short, long = sorted(shape)
    return 3.0 * short**2 * long + eigen_cost(short)


def rank_tolerance(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> float:
    """Fraction of the largest singular value below which a direction of such a matrix is rounding noise.

    Rounding every entry perturbs the spectrum by about eps · √max(m, n) of the typical entry, not by the
    eps · max(m, n) that worst-case bounds give; the latter would cut real directions of large float32 matrices.
    """
    return torch.finfo(dtype).eps * max(8.0, math.sqrt(max(shape)))


def row_lengths(matrix: Tensor) -> Tensor:
    """Euclidean lengths of the rows (m,), in float64, where the square of any float32 is a number of full precision."""
    # The CPU converts a copy, which small parts keep in the cache.
    size = max(1, CACHED // max(1, matrix.shape[1])) if matrix.device.type == "cpu" else max(1, len(matrix))
    parts = torch.split(matrix, size)
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])


def rounding_error(lengths: Tensor, dtype: torch.dtype) -> float:
    """Length up to which a projection on a computed basis is nothing but rounding error.

    A singular vector is off by the precision over the relative gap to its neighbors, hence the power: 6e-6 of the norm
    in float32, 2e-12 in float64.

    Args:
        lengths: Lengths of the rows of what is projected, or its singular values.
        dtype: The precision in which it is known.
    """
    return float(torch.finfo(dtype).eps ** 0.75 * torch.linalg.vector_norm(lengths))


def needs_svd(dtype: torch.dtype, smallest: float, largest: float) -> bool:
    """Whether singular values in this range are beyond the Gram matrix of data of this precision."""
    return dtype == torch.float64 and smallest < GRAM_RESOLUTION * largest


def thin_svd(matrix: Tensor, num_directions: int | None = None, *, floor: float = 0.0) -> Triplets:
    r"""Singular triplets up to the numerical rank, the largest first: :math:`A = U\, \mathrm{diag}(S)\, V^T`.

    Args:
        matrix: Matrix A of shape (m, n), float32 or float64.
        num_directions: Largest number of triplets to return; default all.
        floor: Singular values up to this are noise too: the rounding error of what `matrix` was computed from.

    Returns:
        U (m, r), S (r,) and Vᵀ (r, n) in the matrix's precision, with r at most the numerical rank: no null vectors,
        which no decomposition determines.

    Example:
        A matrix of rank 2 has two triplets.

        >>> A = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
        >>> U, S, Vh = thin_svd(A)
        >>> S
        tensor([2., 1.])
        >>> torch.allclose(U * S @ Vh, A)
        True
        >>> thin_svd(torch.ones(2, 2))[1].shape
        torch.Size([1])
    """
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = thin_svd(matrix.T, num_directions, floor=floor)
        return Uh.T, S, V.T
    values, U = eigen(lambda: gram([matrix]))
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
    Vh = (U.T @ matrix.double()).div_(S[:, None])  # in float32, weak directions would lose their orthogonality
    return U.to(matrix.dtype), S.to(matrix.dtype), Vh.to(matrix.dtype)


def join(parts: Iterable[Triplets]) -> Triplets:
    """The triplets of several matrices of one shape side by side: U (m, Σ r), S (Σ r,) and Vᵀ (Σ r, n)."""
    left, values, right = zip(*parts, strict=True)
    return torch.cat(left, dim=1), torch.cat(values), torch.cat(right)


def orthogonalize(basis: Tensor) -> Tensor:
    r"""The closest matrix with orthonormal rows or columns, whichever are fewer: the polar factor.

    .. math:: B = U S V^T \;\mapsto\; U V^T

    Args:
        basis: Matrix B of shape (m, n). If it is rank deficient, its null directions stay zero.

    Returns:
        A matrix of shape (m, n), in the same precision.

    Example:
        >>> orthogonalize(torch.tensor([[0.0, 3.0], [0.5, 0.0]])).abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    U, _, Vh = thin_svd(basis)
    return U @ Vh
