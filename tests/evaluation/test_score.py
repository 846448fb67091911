"""Intervals of scores, against plain computations."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef

from lightning_drm.data.sharing import Share
from lightning_drm.evaluation import Score, paired_interval
from lightning_drm.evaluation.score import percentile_interval, resample
from lightning_drm.kinds import MetricInfo
from lightning_drm.modules.sample_states import SampleRecorder, SampleStates


def samples_of(metric, predictions: torch.Tensor, target: torch.Tensor) -> SampleStates:
    recorder = SampleRecorder(metric)
    with recorder.listening(Share(len(target), len(target), (0, 1))):
        metric.update(predictions, target)
    samples = recorder.gathered()
    assert samples is not None
    return samples


def test_of_an_accuracy_it_is_the_binomial_one():
    """A resampled accuracy is binomial: its 95 % range is known without resampling."""
    num, right = 400, 300
    target = torch.zeros(num, dtype=torch.long)
    guesses = torch.tensor([0] * right + [1] * (num - right))
    low, high = percentile_interval(resample(samples_of(MulticlassAccuracy(2, average="micro"), guesses, target)))
    half = 1.96 * math.sqrt(0.75 * 0.25 / num)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.005)


def test_of_a_correlation_it_is_that_of_a_plain_bootstrap():
    torch.manual_seed(0)
    target = torch.randn(60, dtype=torch.float64)
    predictions = target + torch.randn(60, dtype=torch.float64)
    samples = samples_of(PearsonCorrCoef(), predictions.float(), target.float())
    interval = percentile_interval(resample(samples, num_resamples=200))
    draws = np.random.RandomState(0)
    plain = []
    for _ in range(200):
        chosen = draws.randint(60, size=60)
        plain.append(np.corrcoef(predictions.numpy()[chosen], target.numpy()[chosen])[0, 1])
    assert interval == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=1e-5)


def test_it_is_the_same_each_time():
    torch.manual_seed(0)
    samples = samples_of(PearsonCorrCoef(), torch.randn(20), torch.randn(20))
    assert resample(samples, num_resamples=50) == resample(samples, num_resamples=50)


def test_a_paired_interval_is_that_of_plain_differences():
    """Two models that err on nearly the same samples: their difference is far surer than either score."""
    draws = np.random.RandomState(1)
    models = {"a": [], "b": []}
    expected = []
    for num in (80, 120):
        right = draws.rand(num) < 0.7
        better = right | (draws.rand(num) < 0.1)
        for name, hits in (("a", better), ("b", right)):
            guesses, target = torch.from_numpy(~hits).long(), torch.zeros(num, dtype=torch.long)
            results = resample(samples_of(MulticlassAccuracy(2, average="micro"), guesses, target))
            models[name].append(Score(hits.mean(), MetricInfo("accuracy"), resampled=results))
        plain = np.random.RandomState(0)
        gains = better.astype(float) - right
        drawn = [gains[plain.randint(num, size=num)].mean() for _ in range(1000)]
        expected.append((gains.mean(), *np.percentile(drawn, [2.5, 97.5])))
    value, low, high = np.array(expected).T
    difference = value.mean()
    ends = (
        difference - np.sqrt(((low - value) ** 2).sum()) / 2,
        difference + np.sqrt(((high - value) ** 2).sum()) / 2,
    )
    assert paired_interval(models["a"], models["b"]) == pytest.approx(ends, abs=1e-6)
    assert ends[1] - ends[0] < 0.1, "each score alone is known to 0.14"
    assert paired_interval(models["a"], [Score(0.5, MetricInfo("accuracy"))] * 2) is None


def test_a_score_reads_as_a_sentence():
    assert str(Score(0.95, MetricInfo("accuracy", is_fraction=True))) == "accuracy 95.0 %"
    assert str(Score(12.3456, MetricInfo("perplexity", higher_is_better=False))) == "perplexity 12.35"
