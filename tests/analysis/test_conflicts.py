"""Confusions and conflicts of one task, counted by hand."""

import numpy as np
import pandas as pd
import pytest
from helpers.three_tasks import CLASSES, ThreeTasks

from lightning_drm import DRM
from lightning_drm.analysis.conflicts import Conflicts

METHOD = DRM(density=0.5)


def test_pairs_and_merges_without_one_task(three_tasks: ThreeTasks):
    finding, _ = three_tasks.analyze(Conflicts("bee"))
    table = pd.read_csv(finding.table, keep_default_na=False).set_index(["model", "other task"])["score"].astype(float)
    pairs = {"ant": ("ant", "bee"), "cat": ("bee", "cat")}
    for other in ("ant", "cat"):
        remaining = tuple(task for task in CLASSES if task != other)
        pair = three_tasks.accuracy(three_tasks.merged(METHOD, pairs[other]), "bee")
        left = three_tasks.accuracy(three_tasks.merged(METHOD, remaining), "bee")
        assert table["merged with one other", other] == pytest.approx(pair)
        assert table["merged without one other", other] == pytest.approx(left)
    own = three_tasks.accuracy(three_tasks.deltas("bee"), "bee")
    merged = three_tasks.accuracy(three_tasks.merged(METHOD), "bee")
    assert (table["finetuned", ""], table["merged", ""]) == pytest.approx((own, merged))
    assert f"bee falls from accuracy {100 * own:.1f} % to accuracy {100 * merged:.1f} %" in finding.sentence
    worst = table["merged with one other"].idxmin()
    assert f"merged with {worst} alone it has accuracy {100 * table['merged with one other', worst]:.1f} %" in (
        finding.sentence
    )


def test_confusions_are_counted_before_and_after(three_tasks: ThreeTasks):
    _, finding = three_tasks.analyze(Conflicts("bee"))
    table = pd.read_csv(finding.table)
    models = {"finetuned": three_tasks.deltas("bee"), "merged": three_tasks.merged(METHOD)}
    for model, deltas in models.items():
        expected = np.zeros((3, 3), dtype=int)
        for predicted, target in zip(*three_tasks.predictions(deltas, "bee"), strict=True):
            expected[target, predicted] += 1
        found = table[table["model"] == model].pivot(index="true class", columns="predicted class", values="samples")
        assert (found.to_numpy() == expected).all()
    assert "Of 32 samples" in finding.sentence


def test_the_task_that_lost_most_is_taken(three_tasks: ThreeTasks):
    merged = three_tasks.merged(METHOD)
    lowest = min(CLASSES, key=lambda task: three_tasks.normalized(merged, task))
    finding, _ = three_tasks.analyze(Conflicts())
    assert finding.title.startswith(f"Conflicts of {lowest} in the merge of 3 tasks (DRM, horizontal, density 0.5)")


def test_an_unknown_task_is_named(three_tasks: ThreeTasks):
    with pytest.raises(ValueError, match="conflicts: There is no task 'dog'; tasks: ant, bee, cat"):
        three_tasks.analyze(Conflicts("dog"))
