r"""Powers of two that keep squares within the range of floats.

A decomposition squares entries: a float64 of 1e160 becomes infinite, and the length of a float32 row of 1e-25 zero. The
methods that decompose are homogeneous, :math:`f(c D_1, …, c D_N) = c f(D_1, …, D_N)`, and a power of two changes no
digit. So deltas that are not `NEAR_ONE` are divided by one, merged, and the result is multiplied again.

Cost: a look at each entry; a copy of the deltas where they must be scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drm.merging.low_rank import Delta, LowRank

NEAR_ONE = (2.0**-40, 2.0**40)
"""Largest magnitudes of usual deltas, whose squares are harmless."""

SPREAD = {torch.float32: 2.0**-96, torch.float64: 2.0**-480}
"""How small a task may be beside the largest one, for its directions to keep all their digits."""


def peak(delta: Delta) -> Tensor:
    """Largest magnitude as a float64 scalar, of factors the product of theirs; NaN where there is one."""
    if isinstance(delta, LowRank):
        return peak(delta.up) * peak(delta.down)
    if not delta.numel():
        return torch.zeros((), dtype=torch.float64, device=delta.device)
    low, high = delta.aminmax()
    return torch.maximum(-low, high).double()


def near_one(deltas: Sequence[Delta]) -> tuple[list[Delta], int]:
    r"""The deltas over a power of two that brings the largest magnitude of all tasks to about 1.

    .. math:: \hat D_t = 2^{-e} D_t

    Args:
        deltas: N finite deltas of one precision, float32 or float64.

    Returns:
        The scaled deltas and e. Deltas that are `NEAR_ONE` already come back as they are, with e = 0.

    Raises:
        ValueError: If factors have a product beyond float64, or a task is so much smaller than another that its
            directions would lose their digits; names tasks by their positions.

    Example:
        >>> near_one([torch.tensor([2.0**100, 0.0]), torch.tensor([0.0, 2.0**90])])
        ([tensor([0.5000, 0.0000]), tensor([0.0000, 0.0005])], 101)
    """
    sizes = torch.stack([peak(delta) for delta in deltas]).tolist()  # one transfer for all tasks
    largest, smallest = max(sizes), min((size for size in sizes if size), default=0.0)
    if not math.isfinite(largest):
        raise ValueError(f"the factors of task {sizes.index(largest)} have a product beyond float64")
    dtype = deltas[0].dtype
    if smallest < largest * SPREAD[dtype]:
        raise ValueError(
            f"delta of task {sizes.index(smallest)} reaches {smallest:.1g}, too little for "
            f"{str(dtype).removeprefix('torch.')} beside the {largest:.1g} of task {sizes.index(largest)}"
        )
    if not largest or NEAR_ONE[0] <= largest <= NEAR_ONE[1]:
        return list(deltas), 0
    exponent = _exponent(largest)
    return [_over(delta, exponent) for delta in deltas], exponent


def numbers_near_one(values: Sequence[float]) -> tuple[list[float], int]:
    """The same of plain numbers, such as coefficients.

    Example:
        >>> numbers_near_one([2.0**50, 0.0])
        ([0.5, 0.0], 51)
    """
    largest = max(map(abs, values))
    if not largest or NEAR_ONE[0] <= largest <= NEAR_ONE[1]:
        return list(values), 0
    exponent = _exponent(largest)
    return [math.ldexp(value, -exponent) for value in values], exponent


def times_power_(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply a tensor by 2^exponent, in place.

    Example:
        >>> times_power_(torch.tensor([3.0]), -2)
        tensor([0.7500])
    """
    while exponent:  # a few steps, as 2^exponent itself may be beyond the tensor's precision
        step = max(-100, min(exponent, 100))
        tensor.mul_(2.0**step)
        exponent -= step
    return tensor


def _exponent(value: float) -> int:
    return math.frexp(value)[1]


def _over(delta: Delta, exponent: int) -> Delta:
    """A copy of a delta over 2^exponent; of factors, each is brought into range."""
    if isinstance(delta, LowRank):
        own = _exponent(float(peak(delta.down)))
        return LowRank(_over_tensor(delta.up, exponent - own), _over_tensor(delta.down, own))
    return _over_tensor(delta, exponent)


def _over_tensor(tensor: Tensor, exponent: int) -> Tensor:
    return times_power_(tensor.clone(), -exponent)
