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
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_drm.merging.linalg.eigen import eigen, eigen_cost

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Left singular vectors U (m, r), singular values S (r,), right singular vectors Vᵀ (r, n)."""

TILE = (768, 384)  # of a Gram matrix, computed at once: enough for full BLAS speed, and its buffers stay small
DEVICE_TILE = (4096, 2048)  # and elsewhere: enough to occupy an accelerator
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
        height, width = TILE if matrix.device.type == "cpu" else DEVICE_TILE
        for part in torch.split(matrix, LENGTH, dim=1):
            block = part.double()
            for left in range(0, len(total), width):
                columns = slice(left, left + width)
                for top in range(0, left + width, height):
                    rows = slice(top, min(top + height, left + width))
                    total[rows, columns].addmm_(block[rows], block[columns].T)
            del block  # before the next one is made
    assert total is not None
    return total


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
