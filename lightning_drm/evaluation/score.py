"""A score: what a task's metric says of one model, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from lightning_drm.kinds import MetricInfo
from lightning_drm.modules import SampleStates

Interval = tuple[float, float]

NUM_RESAMPLES = 1000
"""How many test sets are drawn for an interval."""


@dataclass(frozen=True)
class Score:
    """What a task's metric says of one model.

    Attributes:
        value: The metric's result.
        metric: How to read it.
        interval: Its 95 % interval, from a bootstrap over the test samples; ``None`` where that is not known.
        resampled: The metric's results on the resampled test sets, which are the same sets for every model.
    """

    value: float
    metric: MetricInfo
    interval: Interval | None = None
    resampled: Sequence[float] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """The score as a sentence has it: ``accuracy 95.0 %``."""
        return f"{self.metric.name} {f'{100 * self.value:.1f} %' if self.metric.is_fraction else f'{self.value:.4g}'}"


def resample(samples: SampleStates, num_resamples: int = NUM_RESAMPLES) -> list[float]:
    """A metric's results on test sets that are drawn from one test set, with replacement and of the same size.

    Args:
        samples: Each sample's part in the metric.
        num_resamples: How many sets are drawn: the same ones for every model that is tested on the same samples.
    """
    draws = np.random.RandomState(0).randint(len(samples), size=(num_resamples, len(samples)))
    return samples.results(list(draws))


def percentile_interval(results: Sequence[float]) -> Interval:
    r"""The 95 % percentile interval of a bootstrap (Efron and Tibshirani, 1993, chapter 13).

    It goes from the 2.5th to the 97.5th percentile of what was found on the resampled test sets. It tells how much a
    score owes to the choice of test samples, and nothing about other seeds of training.

    Args:
        results: What was found on each resampled set; NaN where a set has no result.

    Example:
        >>> from torch import tensor
        >>> from torchmetrics import MeanMetric
        >>> metric = MeanMetric(compute_with_cache=False)
        >>> metric.update(0.0)
        >>> coins = [{"mean_value": tensor(i % 2.0), "weight": tensor(1.0)} for i in range(100)]
        >>> low, high = percentile_interval(resample(SampleStates(metric, coins)))
        >>> 0.38 < low < 0.43 < 0.57 < high < 0.62
        True
    """
    low, high = np.nanpercentile(results, [2.5, 97.5])
    return float(low), float(high)


def interval_of_mean(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    r"""The interval of a mean over tasks, whose test sets are apart, so that errors add up in squares.

    .. math:: \bar v \pm \frac{1}{T} \sqrt{\sum_t (e_t - v_t)^2}

    with each task's value :math:`v_t` and its interval's lower, or upper, end :math:`e_t`.

    Args:
        values: One for each task.
        intervals: Their intervals.

    Example:
        >>> interval_of_mean([0.5, 0.7], [(0.46, 0.54), (0.67, 0.73)])
        (0.575, 0.625)
    """
    mean = sum(values) / len(values)
    low, high = (
        sqrt(sum((interval[side] - value) ** 2 for value, interval in zip(values, intervals, strict=True)))
        / len(values)
        for side in (0, 1)
    )
    return mean - low, mean + high


def paired_interval(scores: Sequence[Score], others: Sequence[Score]) -> Interval | None:
    """The 95 % interval of how much higher the mean of one model's scores is than that of another.

    Both were measured on the same samples, so that hard samples count for both, and differences are surer than scores.

    Args:
        scores: One model's scores, one for each task.
        others: The other model's scores of the same tasks.

    Returns:
        The interval; ``None`` where a score's resampled results are not known.

    Example:
        >>> info = MetricInfo("accuracy")
        >>> one, other = Score(0.6, info, resampled=[0.5, 0.6, 0.7]), Score(0.5, info, resampled=[0.4, 0.5, 0.6])
        >>> tuple(round(end, 6) for end in paired_interval([one], [other]))
        (0.1, 0.1)
    """
    values, intervals = [], []
    for score, other in zip(scores, others, strict=True):
        known = min(len(score.resampled), len(other.resampled))  # a slow metric has fewer, the first of the same sets
        if not known:
            return None
        values.append(score.value - other.value)
        intervals.append(percentile_interval(np.subtract(score.resampled[:known], other.resampled[:known]).tolist()))
    return interval_of_mean(values, intervals) if values else None
