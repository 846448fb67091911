"""The trajectory's models are those that snapshots make, with the heads of their step."""

from pathlib import Path

import pandas as pd
import pytest

from helpers.three_tasks import CLASSES, SNAPSHOT, ThreeTasks
from lightning_drm import DRM
from lightning_drm.analysis.trajectory import Trajectory


def test_merged_and_individual_scores_are_those_of_each_step(three_tasks: ThreeTasks):
    (finding,) = three_tasks.analyze(Trajectory())
    table = pd.read_csv(finding.table).set_index(["steps", "model", "task"])["score"]
    averages = {}
    for step, stored in ((SNAPSHOT, SNAPSHOT), (12, None)):
        merged = three_tasks.merged(DRM(density=0.5), step=stored)
        expected = {
            "merged": {task: three_tasks.accuracy(merged, task, stored) for task in CLASSES},
            "individual": {
                task: three_tasks.accuracy(three_tasks.deltas(task, stored), task, stored) for task in CLASSES
            },
        }
        for model, scores in expected.items():
            averages[model, step] = sum(scores.values()) / len(scores)
            assert table[step, model].to_dict() == pytest.approx({**scores, "average": averages[model, step]})
    assert averages["individual", SNAPSHOT] != averages["individual", 12], "the case shows nothing"
    merged, own = ({step: averages[model, step] for step in (SNAPSHOT, 12)} for model in ("merged", "individual"))
    top, own_top = max(merged, key=merged.__getitem__), max(own, key=own.__getitem__)
    assert f"is highest at step {top} ({100 * merged[top]:.1f} ±" in finding.sentence
    assert f"is highest at step {own_top} ({100 * own[own_top]:.1f} ±" in finding.sentence


def test_a_run_without_snapshots_says_what_to_do(three_tasks: ThreeTasks, tmp_path: Path):
    run = ThreeTasks(tmp_path / "run")
    (tmp_path / "run/tasks").mkdir(parents=True)
    for task in CLASSES:
        place = run.place(task)
        place.mkdir()
        for file in three_tasks.place(task).glob("*.*"):
            (place / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="trajectory cannot be run: ant, bee, cat have no snapshots: finetune them ag"):
        run.analyze(Trajectory())
