r"""Independent draws that are the same on every device: PCG64DXSM, by numpy on the CPU and by tensors elsewhere.

numpy keeps the raw output of this generator stable across releases, and it can be advanced at no cost. Its state s, a
number of 128 bits, and its output x, one of 64 (O'Neill 2014, and numpy's ``pcg64.h``):

.. math:: s \leftarrow (M s + c) \bmod 2^{128}, \qquad
    y = M \big(h \oplus \lfloor h / 2^{32} \rfloor\big), \qquad
    x = \big(y \oplus \lfloor y / 2^{48} \rfloor\big) \, (l \mathbin{|} 1) \bmod 2^{64}

with h and l the state's two halves, before the step. As i steps are one of the same form,
:math:`s_i = M_i s_0 + c_i`, tensors compute many states at once: n of them give the next n by the step of n.

Cost on a device: two such products and the output for each number, about 60 operations on integers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_drm.merging.method import PIECE_STEP

MULTIPLIER = 0xDA942042E4DD58B5  # M
HALF, WHOLE = 1 << 64, 1 << 128
LOW = (1 << 32) - 1


class Draws:
    """Independent draws for the entries of one task's parameter, in order.

    Args:
        seed: Start of the draws.
        key: Name that tells this task and parameter from others.
        density: Probability of keeping an entry, resolved to 2⁻³².
        start: How many draws to skip, a multiple of `PIECE_STEP`: two come out of one number of 64 bits.
    """

    def __init__(self, seed: int, key: str, density: float, start: int = 0) -> None:
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
        self._generator = np.random.PCG64DXSM(int.from_bytes(digest, "little"))
        self._generator.advance(start // PIECE_STEP)
        self._limit = round(density * 2**32)

    def kept(self, count: int) -> NDArray[np.bool_]:
        """Which of the next `count` entries stay; `count` must be even but for the last call."""
        raw = self._generator.random_raw((count + 1) // PIECE_STEP)
        return raw.view(np.uint32)[:count] < self._limit

    def kept_on(self, device: torch.device, count: int) -> Tensor:
        """The same, computed on a device: booleans (count,)."""
        num_numbers = (count + 1) // PIECE_STEP
        state = self._generator.state["state"]
        raw = random_raw(state["state"], state["inc"], num_numbers, device)
        self._generator.advance(num_numbers)
        return torch.stack([raw & LOW, _shifted(raw, 32)], dim=1).flatten()[:count] < self._limit


def random_raw(state: int, increment: int, count: int, device: torch.device) -> Tensor:
    """The next numbers of the generator, whose state stays: the bits of 64 each, in int64 (count,).

    Example:
        >>> generator = np.random.PCG64DXSM(0)
        >>> state = generator.state["state"]
        >>> found = random_raw(state["state"], state["inc"], 3, torch.device("cpu"))
        >>> bool((found.numpy().view(np.uint64) == generator.random_raw(3)).all())
        True
    """
    high, low = (torch.tensor([_signed(half)], device=device) for half in divmod(state, HALF))
    factor, summand = MULTIPLIER, increment
    while len(low) < count:
        next_high, next_low = _step(high, low, factor, summand)
        high, low = torch.cat([high, next_high])[:count], torch.cat([low, next_low])[:count]
        factor, summand = factor * factor % WHOLE, (factor + 1) * summand % WHOLE
    high, low = high[:count], low[:count]
    high = (high ^ _shifted(high, 32)) * _signed(MULTIPLIER)
    return (high ^ _shifted(high, 48)) * (low | 1)


def _step(high: Tensor, low: Tensor, factor: int, summand: int) -> tuple[Tensor, Tensor]:
    """The halves of the products with a number of 128 bits, plus another one."""
    (factor_high, factor_low), (summand_high, summand_low) = divmod(factor, HALF), divmod(summand, HALF)
    new_low = low * _signed(factor_low) + _signed(summand_low)
    smallest = _signed(1 << 63)  # turns comparisons of signed numbers into those of unsigned ones
    carry = (new_low ^ smallest) < _signed(summand_low ^ (1 << 63))
    new_high = _product_high(low, factor_low) + high * _signed(factor_low) + low * _signed(factor_high)
    return new_high + _signed(summand_high) + carry, new_low


def _product_high(numbers: Tensor, factor: int) -> Tensor:
    """The upper 64 bits of products of unsigned numbers of 64 bits, from those of their halves."""
    low, high = numbers & LOW, _shifted(numbers, 32)
    factor_high, factor_low = divmod(factor, LOW + 1)
    middle = high * factor_low + _shifted(low * factor_low, 32)
    other = low * factor_high + (middle & LOW)
    return high * factor_high + _shifted(middle, 32) + _shifted(other, 32)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted right as unsigned numbers are, with zeros from the left."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same bits as an unsigned number of 64."""
    return number - HALF if number >= HALF // 2 else number
