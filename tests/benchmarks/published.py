"""Merging as the published scripts do it: the yardstick of the benchmarks. Full SVDs, argsort, one stack of everything.

Written from the papers and their reference code, in the inputs' precision, without any of this package's shortcuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drm(deltas: Sequence[Tensor], direction: str = "horizontal", density: float = 0.2) -> Tensor:
    """SVD of the whole stack, sorted magnitudes, N-fold temporaries (arXiv 2505.23117)."""
    if direction == "vertical":
        return drm([delta.T.contiguous() for delta in deltas], "horizontal", density).T
    U, S, Vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    keep = 1e-2 * S[0] < S
    U, S, Vh = U[:, keep], S[keep], Vh[keep]
    blocks = torch.stack(Vh.split(deltas[0].shape[1], dim=1))
    norms = blocks.norm(dim=2, keepdim=True)
    blocks = blocks / norms
    magnitudes = blocks.abs().flatten()
    k = magnitudes.numel() - round(magnitudes.numel() * density)
    threshold = magnitudes.sort().values[max(k - 1, 0)]
    pruned = torch.where(blocks.abs() < threshold, torch.zeros_like(blocks), blocks) * (norms * S[:, None])
    return U @ elect_and_average(pruned)


def elect_and_average(stack: Tensor) -> Tensor:
    """TIES' sign election and disjoint mean (arXiv 2306.01708)."""
    signs = torch.sign(stack.sum(0))
    kept = torch.where(torch.sign(stack) == signs, stack, torch.zeros_like(stack))
    return kept.sum(0) / (kept != 0).sum(0).clamp(min=1)


def ties(task_vectors: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """One flat vector a task, pruned by argsort, then stacked."""
    pruned = []
    for vector in task_vectors:
        order = vector.abs().argsort()
        kept = vector.clone()
        kept[order[: len(order) - round(len(order) * density)]] = 0
        pruned.append(kept)
    return elect_and_average(torch.stack(pruned))


def task_arithmetic(task_vectors: Sequence[Tensor], scale: float = 0.4) -> Tensor:
    """Sum of a stack."""
    return scale * torch.stack(list(task_vectors)).sum(0)


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """SVD of the sum (arXiv 2502.04959)."""
    U, S, Vh = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    return S.mean() * U @ Vh


def tsv_m(deltas: Sequence[Tensor]) -> Tensor:
    """N + 2 SVDs (arXiv 2412.00081)."""
    rank = min(deltas[0].shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([U[:, :rank] for U, _, _ in parts], dim=1)
    right = torch.cat([Vh[:rank] for _, _, Vh in parts])
    values = torch.cat([S[:rank] for _, S, _ in parts])
    polar = []
    for basis in (left, right):
        U, _, Vh = torch.linalg.svd(basis, full_matrices=False)
        polar.append(U @ Vh)
    return polar[0] * values @ polar[1]
