"""Pruning by magnitude: the threshold of a long stream, exactly, without sorting it and without holding it.

Magnitudes of floats are ordered as the integers that their bits spell. So the k-th smallest is found digit by digit,
as in radix sort: count how often each leading digit occurs, see in which bin the k-th falls, and look only at that
bin's next digit in the next pass. The first digit is 17 bits wide (exponent and 6 bits of fraction), the second takes
all that a float32 has left, so float32 data need two passes; float64 data need four.

The state is one histogram of 2¹⁷ counters for each task, whatever the length of its stream. Counts add up, so ranks
that each see a part of the stream find the same threshold by summing their histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGITS = (17, 17, 15, 14)  # widths of the digits of a float64 without its sign, the leading one first
CHUNK = 1 << 16  # entries counted at once on the CPU: their keys stay in the cache
DEVICE_CHUNK = 1 << 24  # and elsewhere: enough to occupy an accelerator, and 128 MB of keys

Reduce = Callable[[Tensor], Tensor]


def identity(histogram: Tensor) -> Tensor:
    """What a single process does to sum a histogram over its ranks: nothing."""
    return histogram


def thresholds(
    stream: Callable[[], Iterable[Iterable[Tensor]]],
    density: float,
    *,
    num_tasks: int,
    reduce: Reduce = identity,
) -> tuple[float, ...]:
    """Pruning thresholds of several tasks whose pieces are read side by side.

    With L entries in a task's stream and k = L − round(L · density), entries strictly below the k-th smallest magnitude
    are to be pruned; entries equal to it are kept, so ties may keep more than the density asks for.

    Args:
        stream: Called once for each pass; yields, piece by piece, one tensor of any shape for each task.
        density: Share of entries to keep, in (0, 1].
        num_tasks: Number of tasks N.
        reduce: Sums the counts, an int64 tensor on the CPU, over ranks, where each rank reads its share of the pieces.

    Returns:
        One threshold for each task; 0.0 where nothing is to be pruned.
    """
    if density == 1:
        return (0.0,) * num_tasks
    prefixes = [0] * num_tasks
    ranks = [0] * num_tasks
    for level, width in enumerate(DIGITS):
        rest = sum(DIGITS[level + 1 :])
        # The last column counts entries that have non-zero digits after this one.
        histogram = torch.zeros(num_tasks, (1 << width) + 1, dtype=torch.int64)
        for piece in stream():
            for row, prefix, values in zip(histogram, prefixes, piece, strict=True):
                _count(values, level, prefix, row)
        histogram = reduce(histogram)
        for task, row in enumerate(histogram):
            counts = row[:-1].cumsum(0)
            if level == 0:
                ranks[task] = int(counts[-1]) - round(int(counts[-1]) * density)
            digit = int(torch.searchsorted(counts, ranks[task]))
            prefixes[task] = (prefixes[task] << width) + digit
            ranks[task] -= int(counts[digit - 1]) if digit else 0
        if not histogram[:, -1].any():
            break
    bits = np.array([prefix << rest for prefix in prefixes], dtype=np.int64)
    return tuple(bits.view(np.float64).tolist())


def prune(values: Tensor, threshold: float) -> Tensor:
    """A copy of `values` with zeros for the magnitudes strictly below `threshold`."""
    limit = torch.tensor(threshold, dtype=values.dtype)
    # hardshrink also zeroes magnitudes equal to its limit, hence the next smaller number.
    return torch.nn.functional.hardshrink(values, float(torch.nextafter(limit, torch.zeros_like(limit))))


def prune_each(values: Tensor | Sequence[Tensor], limits: Sequence[float]) -> Tensor:
    """Prune N tensors of one shape, each with its own threshold, into a stack (N, …)."""
    if isinstance(values, Tensor) and len(set(limits)) == 1:
        return prune(values, limits[0])
    return torch.stack([prune(task, limit) for task, limit in zip(values, limits, strict=True)])


def _count(values: Tensor, level: int, prefix: int, row: Tensor) -> None:
    """Add to `row` how often each digit of a level follows `prefix` among the magnitudes of `values`."""
    width, rest = DIGITS[level], sum(DIGITS[level + 1 :])
    if level == 0:
        for keys in _keys(values.flatten()):
            counts = _bincount(keys >> rest)
            row[: len(counts)] += counts
        row[-1] += values.numel()  # nearly every entry has digits to come: not worth a look
        return
    # Few entries share the prefix, so they are gathered first, and counted once.
    gathered = [torch.as_tensor(keys[keys >> (width + rest) == prefix]) for keys in _keys(values.flatten())]
    if gathered:
        keys = torch.cat(gathered)
        row[:-1] += torch.bincount((keys >> rest) & ((1 << width) - 1), minlength=1 << width).cpu()
        row[-1] += int((keys & ((1 << rest) - 1)).count_nonzero())


def _keys(values: Tensor) -> Iterator[Tensor | NDArray[np.int64]]:
    """The bits of the magnitudes, as float64, in chunks that are overwritten: numpy on the CPU, tensors elsewhere.

    numpy counts several times faster than torch on the CPU, and waits for no other thread.
    """
    if values.device.type == "cpu":
        magnitudes = np.empty(CHUNK)
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].numpy()
            yield np.abs(chunk, out=magnitudes[: len(chunk)]).view(np.int64)
    else:
        for part in torch.split(values, DEVICE_CHUNK):
            yield part.abs().double().view(torch.int64)


def _bincount(digits: Tensor | NDArray[np.int64]) -> Tensor:
    return torch.bincount(digits).cpu() if isinstance(digits, Tensor) else torch.from_numpy(np.bincount(digits))
