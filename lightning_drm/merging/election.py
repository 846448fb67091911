"""Sign election and the disjoint average, the two steps that TIES, DARE-TIES and DRM share.

At every position the tasks vote: the sign with the larger total mass wins (TIES-Merging, arXiv 2306.01708, section
3.2). Entries of the other sign are dropped, and the rest are averaged over the tasks that still have one. Both steps
read few numbers many times, so callers pass slices that fit into the cache, and no temporary is larger than a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slice_size(num_tasks: int, device: torch.device) -> int:
    """How many positions of N tasks to merge at once, an even number: what the cache or an accelerator takes."""
    entries = 1 << 19 if device.type == "cpu" else 1 << 24
    return max(2, entries // num_tasks // 2 * 2)


def elect_and_average(
    stack: Tensor, coefficients: Sequence[float], *, elect_sign: bool = True, disjoint: bool = True
) -> Tensor:
    r"""Merge the pruned entries of N tasks, position by position.

    .. math:: s = \mathrm{sgn} \sum_t p_t, \qquad A = \{t : \mathrm{sgn}\, p_t = s \ne 0\}, \qquad
        p = \frac{1}{\max(1, |A|)} \sum_{t \in A} \lambda_t p_t

    Args:
        stack: Entries :math:`p_t` of shape (N, …), zero where pruned. Overwritten.
        coefficients: N numbers :math:`\lambda_t`. They weigh the average, not the vote (as in DRM's published code).
        elect_sign: Drop entries whose sign differs from that of their sum over tasks; all of them where the sum is 0.
        disjoint: Divide by the number of entries left, at least 1, instead of by N.

    Returns:
        The merged entries p, of shape (…).

    Example:
        At the first position the sum is 4, so −1 is dropped and two tasks are left. At the second, 3 are.

        >>> stack = torch.tensor([[3.0, 1.0], [-1.0, 2.0], [2.0, 6.0]])
        >>> elect_and_average(stack, [1.0, 1.0, 1.0])
        tensor([2.5000, 3.0000])
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
