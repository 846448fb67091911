"""Averages and ratios of accuracies, with the gaps that they may have."""

import math

import pytest

from helpers.scores import ACCURACY, scores
from lightning_drm.evaluation import Comparison, Score
from lightning_drm.kinds import MetricInfo

METHOD = {"class_path": "lightning_drm.DRM", "init_args": {"density": 0.2}}


def compare(**rows: dict[str, float | None]) -> Comparison:
    empty: dict[str, float | None] = {}
    given = {"base": empty, "individual": empty, "merged": empty, **rows}
    return Comparison(tasks=["b", "a"], method=METHOD, **{name: scores(row) for name, row in given.items()})


def test_averages_and_ratios() -> None:
    comparison = compare(
        base={"a": 0.25, "b": 0.5}, individual={"a": 0.8, "b": 0.9}, merged={"a": 0.6, "b": 0.9, "other": 0.0}
    )
    assert comparison.scores == {
        "base": {"b": 0.5, "a": 0.25, "average": 0.375},
        "individual": {"b": 0.9, "a": 0.8, "average": pytest.approx(0.85)},
        "merged": {"b": 0.9, "a": 0.6, "average": pytest.approx(0.75)},
    }
    assert [list(row) for row in comparison.scores.values()] == [["b", "a", "average"]] * 3
    # The mean of the ratios, not the ratio of the means.
    assert comparison.normalized == {"b": 1.0, "a": pytest.approx(0.75), "average": pytest.approx(0.875)}


def test_a_gap_leaves_no_average() -> None:
    """The mean of some tasks would be read beside the mean of all."""
    comparison = compare(base={"a": 0.25, "b": None}, individual={"a": 0.8}, merged={"a": 0.4, "b": 0.5})
    assert comparison.scores["base"] == {"b": None, "a": 0.25, "average": None}
    assert comparison.scores["individual"] == {"b": None, "a": 0.8, "average": None}
    assert comparison.scores["merged"]["average"] == pytest.approx(0.45)
    assert comparison.normalized == {"b": None, "a": pytest.approx(0.5), "average": pytest.approx(0.5)}
    assert comparison.compared == ["a"]


def test_zero_accuracy_is_a_number_but_no_divisor() -> None:
    comparison = compare(individual={"a": 0.0, "b": 0.5}, merged={"a": 0.5, "b": 0.0})
    assert comparison.scores["individual"]["average"] == 0.25
    assert comparison.normalized == {"b": 0.0, "a": None, "average": 0.0}
    assert comparison.compared == ["b"]


PERPLEXITY = MetricInfo("perplexity", higher_is_better=False)
PEARSON = MetricInfo("pearson", is_fraction=True)


def mixed() -> Comparison:
    """An accuracy, a correlation and a perplexity."""

    def row(accuracy: float, pearson: float, perplexity: float, half: float) -> dict[str, Score]:
        values = {"acc": (accuracy, ACCURACY), "cor": (pearson, PEARSON), "ppl": (perplexity, PERPLEXITY)}
        return {task: Score(v, metric, (v - half, v + half / 2)) for task, (v, metric) in values.items()}

    return Comparison(["acc", "cor", "ppl"], {}, row(0.8, 0.9, 10.0, 0.04), row(0.6, 0.45, 16.0, 0.03), METHOD)


def test_only_what_can_be_averaged_is():
    comparison = mixed()
    assert comparison.metrics == {"acc": ACCURACY, "cor": PEARSON, "ppl": PERPLEXITY}
    assert comparison.averaged == ["acc", "cor"]
    assert comparison.scores["individual"]["average"] == pytest.approx(0.85)
    assert comparison.scores["merged"] == {"acc": 0.6, "cor": 0.45, "ppl": 16.0, "average": pytest.approx(0.525)}


def test_where_lower_is_better_the_ratio_is_turned_round():
    comparison = mixed()
    ratios = {"acc": 0.75, "cor": 0.5, "ppl": 10 / 16}
    assert comparison.normalized == pytest.approx({**ratios, "average": sum(ratios.values()) / 3})
    worse_than_nothing = Comparison(["cor"], {}, scores({"cor": -0.1}, PEARSON), scores({"cor": 0.5}, PEARSON), METHOD)
    assert worse_than_nothing.normalized == {"cor": None, "average": None}


def test_where_nothing_is_wrong_before_and_after_all_is_kept():
    error_rate = MetricInfo("word_error_rate", higher_is_better=False)
    individual, merged = ({"a": 0.0, "b": 0.2, "c": 0.1}, {"a": 0.0, "b": 0.4, "c": 0.0})
    rows = (scores(row, error_rate) for row in (individual, merged))
    comparison = Comparison(["a", "b", "c"], {}, *rows, METHOD)
    assert comparison.normalized == {"a": 1.0, "b": 0.5, "c": None, "average": 0.75}
    assert comparison.compared == ["a", "b"]


@pytest.mark.parametrize("metric", [PEARSON, PERPLEXITY], ids=lambda metric: metric.name)
def test_a_diverged_task_leaves_no_average_that_looks_better(metric: MetricInfo):
    diverged = Comparison(
        ["a", "b"], {}, scores({"a": 2.0, "b": 2.0}, metric), scores({"a": math.nan, "b": 2.0}, metric), METHOD
    )
    assert math.isnan(diverged.normalized["a"])
    assert math.isnan(diverged.normalized["average"])


def test_intervals_of_tasks_make_that_of_the_average():
    """Test sets are drawn apart, so the variances of their scores add up."""
    intervals = mixed().intervals
    assert intervals["merged"]["ppl"] == (15.97, 16.015)
    below, above = math.sqrt(2 * 0.03**2) / 2, math.sqrt(2 * 0.015**2) / 2
    assert intervals["merged"]["average"] == pytest.approx((0.525 - below, 0.525 + above))
    assert intervals["base"] == dict.fromkeys(["acc", "cor", "ppl", "average"])


def test_without_anything_to_average_there_is_no_average():
    row = scores({"a": 3.0, "b": 4.0}, PERPLEXITY)
    comparison = Comparison(["b", "a"], {}, row, row, METHOD)
    assert comparison.averaged == []
    assert comparison.scores["merged"]["average"] is None
    assert comparison.normalized["average"] == 1.0
