"""A score: what a task's metric says of one model, and how sure that is."""

from dataclasses import dataclass

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
    """

    value: float
    metric: MetricInfo
    interval: Interval | None = None

    def __str__(self) -> str:
        """The score as a sentence has it: ``accuracy 95.0 %``."""
        return f"{self.metric.name} {f'{100 * self.value:.1f} %' if self.metric.is_fraction else f'{self.value:.4g}'}"


def bootstrap_interval(samples: SampleStates, num_resamples: int = NUM_RESAMPLES) -> Interval:
    r"""The 95 % percentile interval of a metric over resampled test sets (Efron and Tibshirani, 1993, chapter 13).

    With :math:`n` samples, each resampled set draws :math:`n` of them with replacement; the interval goes from the
    2.5th to the 97.5th percentile of the metric's results on these sets. It tells how much the score owes to the choice
    of test samples, and nothing about other seeds of training.

    Args:
        samples: Each sample's part in the metric.
        num_resamples: How many sets are drawn.

    Example:
        >>> from torch import tensor
        >>> from torchmetrics import MeanMetric
        >>> metric = MeanMetric(compute_with_cache=False)
        >>> metric.update(0.0)
        >>> coins = [{"mean_value": tensor(i % 2.0), "weight": tensor(1.0)} for i in range(100)]
        >>> low, high = bootstrap_interval(SampleStates(metric, coins))
        >>> 0.38 < low < 0.43 < 0.57 < high < 0.62
        True
    """
    draws = np.random.RandomState(0)  # the same sets for every model that is tested on the same samples
    choices = [draws.randint(len(samples), size=len(samples)) for _ in range(num_resamples)]
    low, high = np.nanpercentile(samples.results([chosen.tolist() for chosen in choices]), [2.5, 97.5])
    return float(low), float(high)
