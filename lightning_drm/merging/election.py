"""Sign election and the disjoint average, the two steps that TIES, DARE-TIES and DRM share.

At every position the tasks vote: the sign with the larger total mass wins (TIES-Merging, arXiv 2306.01708, section
3.2). Entries of the other sign are dropped, the rest are averaged over the tasks that still have one. Both steps read
few numbers many times, so callers hand over slices that fit into the cache, and no temporary is larger than a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLICE = 1 << 18  # entries over all tasks handed over at once


def elect_and_average(
    stack: Tensor, coefficients: Sequence[float], *, elect_sign: bool = True, disjoint: bool = True
) -> Tensor:
    """Merge the pruned entries of N tasks.

    Args:
        stack: Entries of shape (N, …), zero where pruned. Overwritten.
        coefficients: N numbers λ. They weigh the average, not the vote (published code of DRM).
        elect_sign: Drop entries whose sign differs from that of the sum over tasks; all of them where it is 0.
        disjoint: Divide by the number of entries left, at least 1, instead of by N.

    Returns:
        The merged entries, of shape (…).
    """
    if elect_sign:
        stack[stack * stack.sum(0).sign() <= 0] = 0
    weights = torch.tensor(coefficients, dtype=stack.dtype, device=stack.device)
    total: Tensor = torch.tensordot(weights, stack, dims=1)
    return total.div_(stack.count_nonzero(0).clamp(min=1) if disjoint else len(stack))
