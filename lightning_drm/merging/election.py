"""Sign election and the disjoint average, the two steps that TIES, DARE-TIES and DRM share.

At every position the tasks vote: the sign with the larger total mass wins (TIES-Merging, arXiv 2306.01708, section
3.2). Entries of the other sign are dropped, the rest are averaged over the tasks that still have one. Both steps read
few numbers many times, so callers hand over slices that fit into the cache, and no temporary is larger than a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slice_size(num_tasks: int, device: torch.device) -> int:
    """How many positions of N tasks to hand over at once, an even number: a cacheful, or an accelerator's fill."""
    entries = 1 << 19 if device.type == "cpu" else 1 << 24
    return max(2, entries // num_tasks // 2 * 2)


def elect_and_average(
    stack: Tensor, coefficients: Sequence[float], *, elect_sign: bool = True, disjoint: bool = True
) -> Tensor:
    """Merge the pruned entries of N tasks.

    Args:
        stack: Entries of shape (N, …), zero where pruned. Overwritten.
        coefficients: N numbers λ. They weigh the average, not the vote (as in the published code of DRM).
        elect_sign: Drop entries whose sign differs from that of their sum over tasks; all of them where it is 0.
        disjoint: Divide by the number of entries left, at least 1, instead of by N.

    Returns:
        The merged entries, of shape (…).
    """
    if elect_sign:
        sign = _sum(stack).sign_()
        stack.mul_(sign).clamp_(min=0)  # what agrees is positive now, what does not is zero
    if len(set(coefficients)) == 1:
        total = _sum(stack).mul_(coefficients[0])
    else:
        total = _sum(stack * stack.new_tensor(coefficients).view(-1, *[1] * (stack.dim() - 1)))
    if elect_sign:
        total.mul_(sign)
    if not disjoint:
        return total.div_(len(stack))
    present = stack.sign_() if elect_sign else stack.sign_().abs_()
    return total.div_(_sum(present).clamp_(min=1))


def _sum(stack: Tensor) -> Tensor:
    """The sum over the first axis: row by row on the CPU, where that is twice as fast as `sum`."""
    if stack.device.type != "cpu" or len(stack) == 1:
        return stack.sum(0)
    first, second, *rest = stack.unbind()
    total = first + second
    for row in rest:
        total += row
    return total
