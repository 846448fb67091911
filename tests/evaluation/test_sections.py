"""Sections that studies add to ``report.json``: they stay while the deltas do, whatever writes the report again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.scores import scores
from lightning_drm.evaluation import Comparison, MadeFrom, add_section, write_report
from lightning_drm.kinds import MetricInfo

ABOUT = MadeFrom({"a": "1a", "b": "2b"}, {"a": "3c", "b": "4d"})
OTHERS = {
    "finetuned again": replace(ABOUT, deltas={"a": "1a", "b": "5e"}),
    "measured on other samples": replace(ABOUT, measured_on={"a": "3c", "b": "5e"}),
}
METRICS = {"a": MetricInfo("accuracy", is_fraction=True), "b": MetricInfo("perplexity", higher_is_better=False)}
NUMBERS = {"a": 0.5, "b": 3.0, "average": 0.5}
METHODS = {
    "TIES, density 0.2": {
        "split": "test",
        "scores": NUMBERS,
        "intervals": dict.fromkeys(NUMBERS),
        "normalized": NUMBERS,
    }
}
TUNED = {
    "title": "DRM, horizontal, density 0.1",
    "scores": NUMBERS,
    "intervals": dict.fromkeys(NUMBERS),
    "normalized": NUMBERS,
}


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def comparison() -> Comparison:
    row = {**scores({"a": 0.5}), **scores({"b": 3.0}, METRICS["b"])}
    return Comparison(["a", "b"], {}, row, row, {"class_path": "lightning_drm.DRM", "init_args": {}})


def test_a_section_begins_a_report(tmp_path: Path) -> None:
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=ABOUT)
    assert report(tmp_path) == {
        "schema": 2,
        "tasks": ["a", "b"],
        "metrics": {
            "a": {"name": "accuracy", "higher_is_better": True},
            "b": {"name": "perplexity", "higher_is_better": False},
        },
        "fractions": ["a"],
        **ABOUT.note(),
        "methods": METHODS,
    }


def test_a_section_joins_a_report(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path, ABOUT)
    before = report(tmp_path)
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=ABOUT)
    add_section("tune", TUNED, tmp_path, metrics=METRICS, made_from=ABOUT)
    assert report(tmp_path) == {**before, "methods": METHODS, "tuned": TUNED}


def test_sections_stay_when_the_report_is_written_again(comparison: Comparison, tmp_path: Path) -> None:
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=ABOUT)
    write_report(comparison, tmp_path, ABOUT)
    assert report(tmp_path)["methods"] == METHODS
    (tmp_path / "report.json").unlink()  # as when another merge puts the report into the history
    write_report(comparison, tmp_path, ABOUT)
    assert report(tmp_path)["methods"] == METHODS


@pytest.mark.parametrize("other", OTHERS)
def test_sections_end_when_a_task_is(other: str, comparison: Comparison, tmp_path: Path) -> None:
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=ABOUT)
    write_report(comparison, tmp_path, OTHERS[other])
    assert "methods" not in report(tmp_path)


@pytest.mark.parametrize("other", OTHERS)
def test_other_scores_do_not_stand_beside_a_section(other: str, comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path, ABOUT)
    add_section("tune", TUNED, tmp_path, metrics=METRICS, made_from=ABOUT)
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=OTHERS[other])
    assert set(report(tmp_path)) == {"schema", "tasks", "metrics", "fractions", "deltas", "measured_on", "methods"}


def test_a_damaged_section_is_named(comparison: Comparison, tmp_path: Path) -> None:
    add_section("compare", METHODS, tmp_path, metrics=METRICS, made_from=ABOUT)
    (tmp_path / "compare" / "section.json").write_text("{")
    with pytest.raises(ValueError, match=r"compare/section\.json is not JSON that can be read"):
        write_report(comparison, tmp_path, ABOUT)
