"""The tables of the alignment analysis, from stored deltas by numpy, and its scores, from the run's report."""

import json

import numpy as np
import pytest
import torch

from helpers.analyzed import TASKS, deltas, table
from helpers.run import Run
from lightning_drm import DRM


def test_cosines_are_those_of_flat_task_vectors(analyzed: Run):
    found = table(analyzed, "alignment_cosines").set_index("part")
    assert set(found["task"]) == {TASKS[0]}
    assert set(found["other task"]) == {TASKS[1]}
    named = deltas(analyzed)
    parts = {"all parameters": list(named), "outside blocks": [name for name in named if ".layer." not in name]}
    parts |= {
        f"model.encoder.encoder.layer.{block}": [name for name in named if f".layer.{block}." in name] for block in "01"
    }
    assert list(found.index) == list(parts)
    for part, names in parts.items():
        one, other = (np.concatenate([named[name][task].ravel() for name in names]) for task in (0, 1))
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert found.loc[part, "cosine"] == pytest.approx(cosine, abs=1e-12)


def test_ratios_are_those_of_the_merge_by_numpy(analyzed: Run):
    found = table(analyzed, "alignment").set_index(["matrix", "task"])
    named = deltas(analyzed, "matrix")
    assert len(found) == len(named) * len(TASKS)
    for name, tasks in named.items():
        merged = DRM().merge([torch.from_numpy(task).float() for task in tasks]).double().numpy()
        left, sigma, _ = np.linalg.svd(merged)
        left_over = np.sqrt((sigma**2).sum() - np.cumsum(sigma**2)[:-1]) / np.linalg.norm(sigma)
        count = int(np.argmax(left_over <= 0.05)) + 1
        for task, delta in zip(TASKS, tasks, strict=True):
            row, part = found.loc[(name, task)], left[:, :count]
            assert row["leading directions"] == count
            plain = np.linalg.norm(part.T @ delta) / np.linalg.norm(delta)
            assert row["alignment ratio"] == pytest.approx(plain, rel=1e-5)  # the merge is float32
            assert row["by chance"] == pytest.approx(np.sqrt(count / len(merged)), rel=1e-12)


def test_scores_are_those_of_the_report(analyzed: Run):
    kept = table(analyzed, "alignment").groupby("task")["normalized score of the task (fraction)"].unique()
    report = json.loads((analyzed.folder / "report.json").read_text())
    for task in TASKS:
        assert kept[task] == pytest.approx([report["normalized"][task]], rel=1e-6)
