"""Averages and ratios of accuracies, with the gaps that they may have."""

import pytest
from helpers.scores import scores

from lightning_drm.evaluation import Comparison

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
