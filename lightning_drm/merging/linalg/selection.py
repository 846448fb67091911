"""Pruning by magnitude: the threshold of a long stream, exactly, without sorting it and without holding it.

Magnitudes of floats are ordered as the integers that their bits spell. So the k-th smallest is found digit by digit,
as in radix sort: count how often each leading digit occurs, see in which bin the k-th falls, and look only at that
bin's next digit in the next pass. The first digit is 17 bits wide (exponent and 6 bits of fraction), the second takes
all that a float32 has left. A sample nearly always shows where to look for the first digit, so float32 data need a
light pass and a full one, or three where the sample misled; float64 data need two more.

The state is one histogram for each task, of 3 · 2¹⁷ counters at most, whatever the length of its stream. Counts add up,
so ranks that each see a part of the stream find the same threshold by summing their histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGITS = (17, 17, 15, 14)  # widths of the digits of a float64 without its sign, the leading one first
CHUNK = 1 << 16  # entries counted at once on the CPU: their keys stay in the cache
DEVICE_CHUNK = 1 << 24  # and elsewhere: enough to occupy an accelerator, and 128 MB of keys

BINS = 3  # the column of the first bin in a row of counters; those before it count more than one digit
SAMPLE_STEP = 16  # every how many entries one is looked at, to guess where the threshold is

TIE = 1e-10
"""Relative difference up to which magnitudes in a computed basis count as equal to the threshold, and are kept.

A task of rank 1 has the same unit row in every direction, up to sign and rounding. Without this tolerance, rounding in
float64 would decide which of its equal entries survive. In float32 it is below the rounding error and has no effect.
"""

Reduce = Callable[[Tensor], Tensor]
Stream = Callable[[], Iterable[Iterable[Tensor]]]


def identity(histogram: Tensor) -> Tensor:
    """What a single process does to sum a histogram over its ranks: nothing, and it stays on its device."""
    return histogram


def thresholds(
    stream: Stream,
    density: float,
    *,
    num_tasks: int,
    reduce: Reduce = identity,
) -> tuple[float, ...]:
    r"""Pruning thresholds of several tasks whose pieces are read side by side.

    For the L magnitudes of a task's stream in ascending order, :math:`|x|_{(1)} \le … \le |x|_{(L)}`, it is

    .. math:: \theta = |x|_{(k)}, \qquad k = L - \mathrm{round}(L \cdot \mathrm{density})

    Entries strictly below it are to be pruned. Entries equal to it are kept, so ties may keep more than the density
    asks for.

    Args:
        stream: Called once for each pass; yields, piece by piece, one tensor of any shape for each task.
        density: Fraction of entries to keep, in (0, 1].
        num_tasks: Number of tasks N.
        reduce: Sums the counts, an int64 tensor on the CPU, over ranks, where each rank reads its share of the pieces.
            `identity` where one process reads them all.

    Returns:
        One threshold θ for each task; 0.0 where nothing is to be pruned.

    Example:
        Of the magnitudes 1, 2, 3, 4, half are to be kept: k = 2.

        >>> thresholds(lambda: [[torch.tensor([4.0, -2.0, 1.0, -3.0])]], 0.5, num_tasks=1)
        (2.0,)
    """
    if density == 1:
        return (0.0,) * num_tasks
    state = _near_a_sample(stream, density, num_tasks, reduce) or _Search([0] * num_tasks, [0] * num_tasks, 0)
    while not state.complete:
        state = _next_digit(stream, density, state, reduce)
    bits = np.array([prefix << sum(DIGITS[state.level :]) for prefix in state.prefixes], dtype=np.int64)
    return tuple(bits.view(np.float64).tolist())


@dataclass(frozen=True)
class _Search:
    """What is known of each task's threshold: its digits before a level, and its rank among those that share them."""

    prefixes: list[int]
    ranks: list[int]
    level: int
    complete: bool = False


def _next_digit(stream: Stream, density: float, state: _Search, reduce: Reduce) -> _Search:
    level, width = state.level, DIGITS[state.level]

    def count(task: int, values: Tensor, row: Tensor) -> None:
        _count(values, level, state.prefixes[task], row)

    histogram = _histogram(stream, len(state.ranks), 1 << width, count, reduce)
    lengths, rests, _ = histogram[:, :BINS].T.tolist()
    digits, ranks = _find(histogram, state.ranks if level else [_rank(length, density) for length in lengths])
    prefixes = [(prefix << width) + digit for prefix, digit in zip(state.prefixes, digits, strict=True)]
    return _Search(prefixes, ranks, level + 1, level + 1 == len(DIGITS) or not any(rests))


def _sampled_digits(stream: Stream, density: float, num_tasks: int, reduce: Reduce) -> list[int]:
    """The first of the three leading digits in whose middle a sample of each task puts the threshold."""
    num_digits = 1 << DIGITS[0]
    histogram = _histogram(stream, num_tasks, num_digits, lambda _, values, row: _count_sample(values, row), reduce)
    digits, _ = _find(histogram, [_rank(length, density) for length in histogram[:, 0].tolist()])
    return [min(max(digit - 1, 0), num_digits - 3) for digit in digits]


def _near_a_sample(stream: Stream, density: float, num_tasks: int, reduce: Reduce) -> _Search | None:
    """The first two digits in a light pass and a full one; ``None`` where the sample misled.

    A sample shows the leading digit, or at least a neighbor of it. The full pass then counts what is below these three
    and looks at the second digit of what is in them, a few entries in a hundred.
    """
    firsts = _sampled_digits(stream, density, num_tasks, reduce)
    width = 3 << DIGITS[1]
    histogram = _histogram(stream, num_tasks, width, lambda t, values, row: _count_near(values, firsts[t], row), reduce)
    lengths, rests, below = histogram[:, :BINS].T.tolist()
    digits, ranks = _find(histogram, [_rank(length, density) for length in lengths])
    for first, under, digit, rank in zip(firsts, below, digits, ranks, strict=True):
        if digit == width or (rank <= 0 and (first or under)):
            return None
    prefixes = [(first << DIGITS[1]) + digit for first, digit in zip(firsts, digits, strict=True)]
    return _Search(prefixes, ranks, 2, not any(rests))


def _histogram(
    stream: Stream, num_tasks: int, num_bins: int, count: Callable[[int, Tensor, Tensor], None], reduce: Reduce
) -> Tensor:
    """What is counted of all pieces on all ranks, on the pieces' device, which nothing leaves unless there are ranks.

    Args:
        stream: As in `thresholds`.
        num_tasks: Number of tasks N.
        num_bins: How many digits are told apart.
        count: Takes a task's index, its values and its row of counters, and adds to them.
        reduce: As in `thresholds`.

    Returns:
        Counters (N, BINS + num_bins). Those before the bins: how many values there are, how many have digits that are
        not zero after those that are counted, and how many are below the first bin.
    """
    total = torch.zeros(num_tasks, BINS + num_bins, dtype=torch.int64)
    for piece in stream():
        for task, values in zip(range(num_tasks), piece, strict=True):
            total = total.to(values.device)
            count(task, values, total[task])
    return total if reduce is identity else reduce(total.cpu()).to(total.device)


def _find(histogram: Tensor, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each task, the bin into which the value of its rank falls, and its rank among those; sums up the counters."""
    found = []
    for row, rank in zip(histogram, ranks, strict=True):
        counts = row[BINS - 1 :].cumsum_(0)  # in place: there are megabytes of them
        digit = torch.searchsorted(counts[1:], rank)
        found.append(torch.stack([digit, rank - counts.take(digit)]))
    digits, left = torch.stack(found).T.tolist()
    return digits, left


def _rank(count: int, density: float) -> int:
    return count - round(count * density)


def prune(values: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    r"""A copy of `values`, in `out` if given, with zeros for the magnitudes strictly below `threshold`.

    .. math:: x \mapsto x \cdot [\, |x| \ge \theta \,]

    Args:
        values: Numbers x of any shape.
        threshold: θ, at least 0.
        out: Takes the result, of the same shape.

    Returns:
        The pruned copy.

    Example:
        >>> prune(torch.tensor([4.0, -2.0, 1.0, -3.0]), 2.0)
        tensor([ 4., -2.,  0., -3.])
    """
    number = np.float64 if values.dtype == torch.float64 else np.float32
    # hardshrink also zeroes magnitudes equal to its limit, hence the next smaller number.
    limit = float(np.nextafter(number(threshold), number(0)))
    return torch.hardshrink(values, limit) if out is None else torch.hardshrink(values, limit, out=out)


def prune_each(values: Sequence[Tensor], limits: Sequence[float]) -> Tensor:
    """Prune N tensors of one shape, each with its own threshold, into a stack (N, …)."""
    stack = values[0].new_empty(len(values), *values[0].shape)
    for row, task, limit in zip(stack, values, limits, strict=True):
        prune(task, limit, out=row)
    return stack


def _count(values: Tensor, level: int, prefix: int, row: Tensor) -> None:
    """Add to `row` how often each digit of a level follows `prefix` among the magnitudes of `values`."""
    width, rest = DIGITS[level], sum(DIGITS[level + 1 :])
    row[0] += values.numel()
    for keys in _keys(values.flatten()):
        if level == 0:
            _add_counts(keys >> rest, row[BINS:])
            continue
        near = keys[keys >> (width + rest) == prefix]
        _add_counts((near >> rest) & ((1 << width) - 1), row[BINS:])
        row[1] += _num_nonzero(near & ((1 << rest) - 1))
    if level == 0:
        row[1] += values.numel()  # nearly every entry has digits to come: not worth a look


def _count_sample(values: Tensor, row: Tensor) -> None:
    """Add to `row` how often each leading digit occurs, from a sample."""
    step = SAMPLE_STEP if values.numel() >= CHUNK else 1
    for keys in _keys(values.flatten()[::step]):
        row[0] += len(keys) * step
        _add_counts(keys >> sum(DIGITS[1:]), row[BINS:], step)


def _count_near(values: Tensor, first: int, row: Tensor) -> None:
    """Add to `row` what `_near_a_sample` wants to know of the three leading digits from `first` on."""
    low, high = first << sum(DIGITS[1:]), (first + 3) << sum(DIGITS[1:])
    rest = sum(DIGITS[2:])
    row[0] += values.numel()
    for num_below, keys in _between(values.flatten(), low, high):
        near = keys - low
        row[1] += _num_nonzero(near & ((1 << rest) - 1))
        row[2] += num_below
        _add_counts(near >> rest, row[BINS:])


def _between(values: Tensor, low: int, high: int) -> Iterator[tuple[int | Tensor, Tensor | NDArray[np.int64]]]:
    """For each chunk, how many keys are below `low`, and the keys from `low` to below `high`."""
    edges = np.array([low, high], dtype=np.uint64).view(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        singles = edges.astype(np.float32)
    if _on_host(values) and values.dtype == torch.float32 and (singles == edges).all():
        magnitudes = np.empty(CHUNK, dtype=np.float32)  # compared as they are, which halves the work
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].numpy()
            found = np.abs(chunk, out=magnitudes[: len(chunk)])
            under = found < singles[0]
            near = found[under ^ (found < singles[1])]
            yield int(np.count_nonzero(under)), near.astype(np.float64).view(np.int64)
        return
    for keys in _keys(values):
        yield _num_nonzero(keys < low), keys[(keys < high) & (keys >= low)]


def _keys(values: Tensor) -> Iterator[Tensor | NDArray[np.int64]]:
    """The bits of the magnitudes, as float64, in chunks that are overwritten: numpy on the CPU, tensors elsewhere.

    numpy counts several times faster than torch on the CPU, and waits for no other thread.
    """
    if _on_host(values):
        magnitudes = np.empty(CHUNK)
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].numpy()
            yield np.abs(chunk, out=magnitudes[: len(chunk)]).view(np.int64)
    else:
        for part in torch.split(values, DEVICE_CHUNK):
            yield part.abs().double().view(torch.int64)


def _on_host(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _add_counts(digits: Tensor | NDArray[np.int64], row: Tensor, step: int = 1) -> None:
    """Add to `row` how often each digit occurs where one entry in `step` was looked at."""
    if isinstance(digits, Tensor):
        row.add_(torch.bincount(digits, minlength=len(row)), alpha=step)
    else:
        np.add.at(row.numpy(), digits, step)  # no counters but those of `row`, unlike `bincount`, and as fast


def _num_nonzero(values: Tensor | NDArray[Any]) -> int | Tensor:
    return values.count_nonzero() if isinstance(values, Tensor) else int(np.count_nonzero(values))
