"""Plain float64 versions of every method, written as the papers write them, for the tests to compare with.

Nothing here is shared with the package: full SVDs, sorts and loops over tasks, no reuse, no low rank, no regard for
speed. Inputs are sequences of (m, n) tensors; everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _float64(deltas: Sequence[Tensor]) -> list[Tensor]:
    return [delta.double() for delta in deltas]


def _coefficients(deltas: Sequence[Tensor], coefficients: Sequence[float] | None) -> list[float]:
    return [1.0] * len(deltas) if coefficients is None else list(coefficients)


def trim(values: Tensor, density: float, tie: float = 0.0) -> Tensor:
    """Zero what is strictly below the k-th smallest magnitude, k = L - round(L * density), but for near ties."""
    k = values.numel() - round(values.numel() * density)
    if k <= 0:
        return values.clone()
    threshold = values.abs().flatten().sort().values[k - 1]
    return torch.where(values.abs() < threshold * (1 - tie), torch.zeros_like(values), values)


def elect_and_average(
    stack: Tensor, coefficients: Sequence[float], elect_sign: bool = True, disjoint: bool = True
) -> Tensor:
    """Keep the entries of the sign with the larger mass, weigh them, divide by how many are left. `stack`: (N, …)."""
    if elect_sign:
        majority = torch.sign(stack.sum(0))
        stack = torch.where(torch.sign(stack) == majority, stack, torch.zeros_like(stack))
    weighted = torch.stack([coefficient * part for coefficient, part in zip(coefficients, stack, strict=True)])
    count = (stack != 0).sum(0).clamp(min=1) if disjoint else torch.tensor(len(stack))
    return weighted.sum(0) / count


def num_kept(S: Tensor, rank_tol: float, rank_drop: float) -> int:
    """How many joint directions take part: those above `rank_tol` of the largest, less the dropped fraction of them."""
    above = int((rank_tol * S[0] < S).sum()) if len(S) and S[0] > 0 else 0
    return max(min(above, 1), round((1 - rank_drop) * above))


def drm(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    direction: str = "horizontal",
    density: float = 0.2,
    rank_tol: float = 1e-2,
    rank_drop: float = 0.0,
    renormalize: bool = True,
    prune: str = "joint",
    elect_sign: bool = True,
    disjoint: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Decom-Renorm-Merge with the SVD of the whole stack (arXiv 2505.23117, Algorithm 1)."""
    deltas = _float64(deltas)
    coefficients = _coefficients(deltas, coefficients)
    if direction == "vertical":
        transposed = [delta.T for delta in deltas]
        return drm(
            transposed,
            coefficients,
            "horizontal",
            density,
            rank_tol,
            rank_drop,
            renormalize,
            prune,
            elect_sign,
            disjoint,
            scale,
        ).T
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    keep = num_kept(S, rank_tol, rank_drop)
    if keep == 0:
        return torch.zeros_like(deltas[0])
    U, S, Vh = U[:, :keep], S[:keep], Vh[:keep]
    blocks = torch.stack(Vh.split(deltas[0].shape[1], dim=1))  # (N, r, n)
    sigma = S.expand(len(deltas), -1).clone()
    if renormalize:
        norms = blocks.norm(dim=2)
        # A block below the SVD's own rounding is a task without any part in this direction.
        blocks = torch.where((norms > 1e-13)[..., None], blocks / norms[..., None], torch.zeros_like(blocks))
        sigma = sigma * norms
    # Equal entries that the SVD rounds differently are ties: a task of rank 1 has the same unit row everywhere.
    pruned = trim(blocks, density, 1e-10)
    if prune == "individual":
        pruned = torch.stack([trim(block, density, 1e-10) for block in blocks])
    scaled = sigma[..., None] * pruned
    return scale * U @ elect_and_average(scaled, coefficients, elect_sign, disjoint)


def ties(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, density: float = 0.2, scale: float = 1.0
) -> Tensor:
    """TIES with one threshold per tensor (arXiv 2306.01708, Algorithm 1)."""
    deltas = _float64(deltas)
    trimmed = torch.stack([trim(delta, density) for delta in deltas])
    return scale * elect_and_average(trimmed, _coefficients(deltas, coefficients))


def task_arithmetic(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 0.4
) -> Tensor:
    """Weighted sum (arXiv 2212.04089)."""
    deltas = _float64(deltas)
    return scale * sum(
        coefficient * delta for coefficient, delta in zip(_coefficients(deltas, coefficients), deltas, strict=True)
    )


def average(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None) -> Tensor:
    """Weighted sum over the number of tasks."""
    return task_arithmetic(deltas, coefficients, scale=1.0 / len(deltas))


def _svd(matrix: Tensor, rank: int | None = None, size: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The numerical rank's triplets, at most `rank`; `size` is the norm of what the matrix is a remainder of."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    noise = max(matrix.shape) * torch.finfo(S.dtype).eps * max(size, float(S[:1].sum()))
    kept = min(int((noise < S).sum()), len(S) if rank is None else rank)
    return U[:, :kept], S[:kept], Vh[:kept]


def _polar(matrix: Tensor) -> Tensor:
    U, _, Vh = _svd(matrix)
    return U @ Vh


def iso_c(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """Isotropic merging in the common subspace (arXiv 2502.04959, Algorithm 1)."""
    total = task_arithmetic(deltas, coefficients, scale=1.0)
    U, S, Vh = _svd(total)
    return scale * S.mean() * U @ Vh if len(S) else torch.zeros_like(total)


def iso_cts(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    common_fraction: float = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Isotropic merging in common and task-specific subspaces (arXiv 2502.04959, Algorithm 2)."""
    deltas = [c * delta for c, delta in zip(_coefficients(deltas, coefficients), _float64(deltas), strict=True)]
    full = min(deltas[0].shape)
    rest = min(round((full - int(full * common_fraction)) / len(deltas)), full // len(deltas)) * len(deltas)
    common = full - rest
    U, S, Vh = _svd(sum(deltas), common)
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vh = _svd(delta - U @ (U.T @ delta), rest // len(deltas), float(delta.norm()))
        lefts.append(u)
        values.append(s)
        rights.append(vh)
    left = torch.cat([*lefts, U], dim=1)
    right = torch.cat([*rights, Vh], dim=0)
    mean = torch.cat([*values, S]).sum() / max(1, left.shape[1])
    return scale * mean * _polar(left) @ _polar(right)


def tsv_m(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """Task singular vectors (arXiv 2412.00081, Algorithm 1)."""
    deltas = _float64(deltas)
    rank = min(deltas[0].shape) // len(deltas)
    parts = [_svd(delta, rank) for delta in deltas]
    weights = _coefficients(deltas, coefficients)
    left = torch.cat([u for u, _, _ in parts], dim=1)
    right = torch.cat([vh for _, _, vh in parts], dim=0)
    values = torch.cat([c * s for c, (_, s, _) in zip(weights, parts, strict=True)])
    return scale * _polar(left) @ (values[:, None] * _polar(right))
