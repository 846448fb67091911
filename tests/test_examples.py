"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_cnn_two_tasks_merges_a_plain_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    accuracy = runpy.run_path(str(EXAMPLES / "cnn_two_tasks.py"))["main"]()
    assert accuracy["individual"]["digit"] > 0.85
    assert accuracy["individual"]["odd"] > 0.9
    # Better than guessing the most frequent class on both tasks at once, with one backbone.
    assert accuracy["merged"]["digit"] > 0.3
    assert accuracy["merged"]["odd"] > 0.6
