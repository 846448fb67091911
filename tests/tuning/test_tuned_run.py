"""`MergeTrainer.tune`: what it writes and says, and that it looks at the test sets once."""

import json

import pandas as pd
import pytest
import yaml

from helpers.studied import TASKS, StudiedRun
from helpers.tiny import VectorTask
from lightning_drm import DRM

GRID = {"DRM": {"density": [0.2, 0.6], "scale": [0.8, 1.2, 30.0]}, "TaskArithmetic": {"scale": [0.5, 1.0]}}


def test_what_a_search_leaves_behind(run: StudiedRun, capsys: pytest.CaptureFixture):
    before = json.loads((run.folder / "report.json").read_text())
    run.tune(grid=GRID, num_samples=60, num_finalists=2)
    said = " ".join(capsys.readouterr().out.split())
    folder = run.folder / "tune"
    report = json.loads((run.folder / "report.json").read_text())
    assert {name: value for name, value in report.items() if name != "tuned"} == before, "the untuned numbers stay"

    table = pd.read_csv(folder / "trials.csv")
    on_sample = table[table["validation samples per task"] == "60"]
    assert list(zip(on_sample["method"], on_sample["density"].fillna(0), on_sample["scale"], strict=True)) == [
        *(("lightning_drm.DRM", density, scale) for density in (0.2, 0.6) for scale in (0.8, 1.2, 30.0)),
        *(("lightning_drm.TaskArithmetic", 0, scale) for scale in (0.5, 1.0)),
    ]
    assert list(on_sample["state"]) == [
        "complete" if one else "pruned" for one in on_sample["normalized average"].notna()
    ]
    measured = on_sample[[f"score of {task}" for task in TASKS]]
    assert ((60 * measured.stack().dropna()).round(4) % 1 == 0).all(), "sixtieths: accuracies on 60 samples"
    finals = table[table["validation samples per task"] == "all"]
    assert len(finals) == 3, "two finalists, and the setting that is configured"
    assert (finals["coefficient of first"] == 1.0).all()
    for name in ("DRM-horizontal", "TaskArithmetic"):
        assert {(folder / f"{name}.{kind}").is_file() for kind in ("csv", "svg", "json")} == {True}

    tuned = report["tuned"]
    best = finals.sort_values("normalized average", ascending=False, kind="stable").iloc[0]
    assert (tuned["class_path"], tuned["init_args"]["scale"]) == (best["method"], best["scale"])
    assert tuned["coefficients"] == dict.fromkeys(TASKS, 1.0)
    assert tuned["validation"]["tuned"]["normalized"]["average"] == pytest.approx(best["normalized average"], abs=1e-12)
    assert tuned["validation"]["tuned"]["normalized"]["average"] >= finals["normalized average"].max() - 1e-12
    assert tuned["num_settings"] == 8
    individual = before["scores"]["individual"]
    for task in TASKS:
        assert tuned["normalized"][task] == tuned["scores"][task] / individual[task]
        low, high = tuned["intervals"][task]
        assert low <= tuned["scores"][task] <= high
    assert tuned["scores"]["average"] == pytest.approx(sum(tuned["scores"][task] for task in TASKS) / 2)

    assert "Best of 8 settings" in said
    shown = [f"{100 * row['average']:.1f}" for row in (individual, before["scores"]["merged"], tuned["scores"])]
    assert all(number in said.partition("│ average")[2][:80] for number in shown), said
    assert "study.db" in said
    assert "best.yaml" in said
    best_file = yaml.safe_load((folder / "best.yaml").read_text())
    assert best_file["drm"]["method"] == {name: tuned[name] for name in ("class_path", "init_args")}

    run.tune(grid={"TaskArithmetic": {"scale": [0.5]}}, num_samples=60)
    assert sorted(path.stem for path in folder.glob("*.svg")) == ["TaskArithmetic"], "pictures of an earlier search go"


def test_test_sets_are_looked_at_once(run: StudiedRun, capsys: pytest.CaptureFixture):
    options = {"grid": {"DRM": {"density": [0.2, 0.6], "scale": [1.0]}}, "num_samples": 40}

    def asked() -> list[int]:
        return [task.num_tested for task in run.data.tasks.values()]

    run.tune(**options)
    assert asked() == [1, 1]
    report = json.loads((run.folder / "report.json").read_text())["tuned"]
    capsys.readouterr()
    run.tune(**options)
    assert asked() == [1, 1], "resumed with nothing new"
    assert "the test sets are not touched again" in " ".join(capsys.readouterr().out.split())
    assert json.loads((run.folder / "report.json").read_text())["tuned"] == report
    run.tune(grid={"DRM": {"density": [0.6], "scale": [-1.0]}}, num_samples=40)
    assert asked() == [2, 2], "another setting was chosen"


def test_the_configured_method_may_be_any_and_nothing_merged_yet(run: StudiedRun, capsys: pytest.CaptureFixture):
    (run.folder / "report.json").unlink()
    run.trainer(method=DRM("vertical")).tune(
        VectorTask(lr=0.3), run.data, search="tpe", coefficients="each", num_trials=2, num_samples=20
    )
    tuned = json.loads((run.folder / "report.json").read_text())["tuned"]
    assert tuned["init_args"]["direction"] == "vertical"
    assert all(0.8 <= value <= 1.5 for value in tuned["coefficients"].values())
    assert tuned["coefficients"]["first"] != tuned["coefficients"]["second"]
    table = capsys.readouterr().out
    assert "untuned" not in table.partition("┡")[0].partition("┏")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "each"}, "give --search tpe or gradient with --coefficients each"),
        ({"num_finalists": 0}, "num_finalists must be at least 1, got 0"),
        ({"grid": {"DRM": {"scale": []}}}, "The grid of DRM gives no values for scale"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(run: StudiedRun, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run.tune(**options)
    assert not (run.folder / "tune").exists()
