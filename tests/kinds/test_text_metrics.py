"""Metrics of texts and tokens against counting by hand."""

import copy
import pickle
import random

import pytest
import torch
from torchmetrics import Metric

from helpers.tiny_language import WORDS
from lightning_drm.kinds import ExactMatch, MetricInfo, Rouge, TaskMetrics, TokenAccuracy


def make_texts(count: int) -> tuple[list[str], list[str]]:
    draw = random.Random(0)
    target = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(count)]
    written = [text if draw.random() < 0.3 else " ".join(draw.sample(text.split() + WORDS[:2], k=2)) for text in target]
    return written, target


def f_measure(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def plain_rouge(written: str, target: str) -> dict[str, float]:
    """Lin's definitions, word by word."""
    ours, theirs = written.split(), target.split()
    found = {}
    for n in (1, 2):
        grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (ours, theirs)]
        common = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
        found[f"rouge{n}"] = f_measure(common, len(grams[0]), len(grams[1]))
    longest = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
    return {**found, "rougeL": f_measure(longest[-1][-1], len(ours), len(theirs))}


def in_batches(metric: Metric, written: list[str], target: list[str], size: int) -> Metric:
    for start in range(0, len(written), size):
        metric.update(written[start : start + size], target[start : start + size])
    return metric


@pytest.mark.parametrize("size", [1, 3, 40])
def test_exact_match_and_rouge(size: int):
    written, target = make_texts(40)
    equal = sum(a == b for a, b in zip(written, target, strict=True)) / 40
    assert 0.1 < equal < 0.9
    assert float(in_batches(ExactMatch(), written, target, size).compute()) == pytest.approx(equal, rel=1e-6)
    expected = [plain_rouge(a, b) for a, b in zip(written, target, strict=True)]
    for key, value in in_batches(Rouge(), written, target, size).compute().items():
        assert float(value) == pytest.approx(sum(row[key] for row in expected) / 40, rel=1e-6), key


def test_token_accuracy_counts_tokens():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, 3, generator=generator)
    target = torch.randint(3, (5, 7), generator=generator)
    target[torch.rand(5, 7, generator=generator) < 0.4] = -100
    right = [
        max(range(3), key=lambda token: scores[i, j, token].item()) == target[i, j]
        for i in range(5)
        for j in range(7)
        if target[i, j] >= 0
    ]
    for parts in ([5], [1, 3, 1]):
        metric = TokenAccuracy()
        for ours, theirs in zip(scores.split(parts), target.split(parts), strict=True):
            metric.update(ours, theirs)
        assert float(metric.compute()) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("metric", [ExactMatch(), Rouge(), TokenAccuracy()])
def test_metrics_survive_copies_and_say_how_to_read_them(metric: Metric):
    for copied in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert copied.metric_state.keys() == metric.metric_state.keys()
    assert MetricInfo.of("name", metric) == MetricInfo("name", higher_is_better=True, is_fraction=True)


def test_a_metric_with_several_results_gives_each_under_its_name():
    metrics = TaskMetrics({"exact_match": ExactMatch(), "rouge": Rouge()}, score="rougeL")
    metrics.update(["red cat", "dog"], ["red dog", "dog"])
    assert metrics.results() == {
        "exact_match": pytest.approx(0.5),
        "rouge1": pytest.approx(0.75),
        "rouge2": pytest.approx(0.0),
        "rougeL": pytest.approx(0.75),
    }
    assert metrics.score_info == MetricInfo("rougeL", higher_is_better=True, is_fraction=True)
