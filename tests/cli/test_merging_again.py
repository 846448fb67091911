"""Merging again: earlier merges stay, reports say what was merged, and scores of different test sets never mix."""

import json
from pathlib import Path

import pytest

from helpers.run import Run
from lightning_drm.cli.main import main

REPORT_FILES = ("report.json", "report.md", "report.png", "report.svg", "report.html")


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(run: Run, *words: str) -> None:
    main(["merge", *run.words, *words])


def test_another_method_puts_the_merge_before_it_into_the_history(copied: Run, capsys: pytest.CaptureFixture):
    run = copied.folder
    merged, page = contents(run / "merged"), report(run)
    merge(copied, "--drm.method", "IsoC")
    assert report(run)["method"]["class_path"] == "lightning_drm.IsoC"
    (earlier,) = (run / "history").iterdir()
    assert earlier.name.startswith("DRM-")
    assert contents(earlier / "merged") == merged
    assert report(earlier) == page
    assert {path.name for path in earlier.iterdir()} == {"merged", *REPORT_FILES}
    assert str(earlier) in capsys.readouterr().out


def test_what_is_merged_alike_takes_its_own_place(copied: Run):
    run = copied.folder
    merged = contents(run / "merged")
    merge(copied)
    assert contents(run / "merged") == merged
    assert not (run / "history").exists()
    for method in ("IsoC", "TSVM", "IsoC"):
        merge(copied, "--drm.method", method)
    assert sorted(path.name.partition("-")[0] for path in (run / "history").iterdir()) == ["DRM", "IsoC", "TSVM"]
    merge(copied)
    assert contents(run / "merged") == merged


def test_settings_of_one_method_are_merges_of_their_own(copied: Run):
    merge(copied, "--drm.method.density", "0.5")
    merge(copied, "--drm.coefficients", '{"pet": 0.5}')
    assert len(list((copied.folder / "history").iterdir())) == 2


def test_a_kill_between_report_and_model_loses_nothing(copied: Run):
    run = copied.folder
    page, merged = report(run), contents(run / "merged")
    merge(copied, "--drm.method", "IsoC")
    (earlier,) = (run / "history").iterdir()
    (earlier / "merged").rename(run / "kept")  # as after a kill: the report has moved, and the model has not
    (run / "merged").rename(run / "lost")
    for name in REPORT_FILES:
        (run / name).unlink()
    (run / "kept").rename(run / "merged")
    merge(copied, "--drm.method", "IsoC")
    assert report(earlier) == page
    assert contents(earlier / "merged") == merged


def test_test_does_not_call_what_was_merged_by_another_name(copied: Run, capsys: pytest.CaptureFixture):
    run = copied.folder
    merge(copied, "--drm.method", "IsoC")
    page = report(run)
    with pytest.raises(SystemExit) as ended:
        main(["test", *copied.words])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "class_path: lightning_drm.IsoC → lightning_drm.DRM" in message
    assert "run `merge` to merge with this configuration" in message
    assert report(run) == page
    main(["test", *copied.words, "--drm.method", "IsoC"])
    assert report(run) == page


def test_scores_of_another_test_set_are_measured_again(copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = copied.folder
    before = report(run)["accuracy"]
    metrics = json.loads((run / "tasks/pet/metrics.json").read_text())
    merge(copied, "--data.tasks.pet.init_args.max_eval_samples", "7")
    output = capsys.readouterr().out
    assert "pet: its scores are of other test data" in output
    assert "color: its scores" not in output
    scores = report(run)["accuracy"]
    assert all(scores[row]["color"] == before[row]["color"] for row in scores)
    assert all((7 * scores[row]["pet"]) % 1 == pytest.approx(0, abs=1e-6) for row in scores), "sevenths, in every row"
    again = json.loads((run / "tasks/pet/metrics.json").read_text())
    assert again["test_set"] != metrics["test_set"]
    assert again["deltas"] == metrics["deltas"]
    assert again["individual"] == scores["individual"]["pet"]


def test_scores_that_were_measured_on_something_else_are_measured_again(copied: Run, capsys: pytest.CaptureFixture):
    run = copied.folder
    merge(copied)
    assert "measured again" not in capsys.readouterr().out
    metrics = json.loads((run / "tasks/pet/metrics.json").read_text())
    (run / "tasks/pet/metrics.json").write_text(json.dumps({**metrics, "individual": 0.123, "test_set": "another"}))
    merge(copied)
    assert "pet: its scores are of other test data" in capsys.readouterr().out
    assert report(run)["accuracy"]["individual"]["pet"] == metrics["individual"]


def test_test_stores_what_it_measured(copied: Run):
    path = copied.folder / "tasks/pet/metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "individual": 0.123}))
    main(["test", *copied.words])
    assert json.loads(path.read_text()) == metrics
