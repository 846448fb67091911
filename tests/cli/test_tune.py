"""`lightning-drm tune`: a kill loses no trial, and `merge` takes the best setting."""

import json
import shlex
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertModel

from helpers.run import Run
from helpers.signals import start_cli
from lightning_drm.cli.main import main
from lightning_drm.evaluation.page_commands import commands

GRID = {"DRM": {"density": [0.1, 0.5, 1.0], "scale": [0.8, 1.1, 1.4]}, "TIES": {"density": [0.5], "scale": [0.9]}}


@pytest.fixture
def words(copied: Run, tmp_path: Path) -> list[str]:
    """A command line with a grid in an overlay."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"grid": GRID, "num_samples": 8, "prune": False}))
    return [*copied.words, "--config", str(tmp_path / "grid.yaml")]


def finished_trials(folder: Path) -> list[tuple[object, ...]]:
    """What any program may read from Optuna's file: of each finished trial its number, study, start and end."""
    file = folder / "tune" / "study.db"
    if not file.is_file():
        return []
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        try:
            columns = "trial_id, study_id, datetime_start, datetime_complete"
            return database.execute(
                f"SELECT {columns} FROM trials WHERE state = 'COMPLETE' ORDER BY trial_id"
            ).fetchall()
        except sqlite3.OperationalError:  # its tables are not made yet, or it is just being written
            return []


@pytest.mark.processes
def test_after_a_kill_finished_trials_stay_and_the_others_follow(copied: Run, words: list[str], tmp_path: Path):
    process = start_cli("tune", *words, folder=tmp_path)
    deadline = time.monotonic() + 180
    while len(finished_trials(copied.folder)) < 3:
        assert process.exitcode is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    before = finished_trials(copied.folder)
    assert 3 <= len(before) < 10
    assert not (copied.folder / "tune" / "trials.csv").exists()

    main(["tune", *words])
    after = finished_trials(copied.folder)
    assert after[: len(before)] == before, "what was finished was not run again"
    studies = [study for _, study, *_ in after]
    sizes = sorted(studies.count(study) for study in set(studies))
    table = pd.read_csv(copied.folder / "tune" / "trials.csv")
    assert len(table[table["validation samples per task"] == "8"]) == 10
    assert sum(sizes) == len(table), "each setting once on the sample, and the finalists once on all samples"


def test_merge_takes_the_best_setting_and_reaches_the_same_scores(
    copied: Run, words: list[str], capsys: pytest.CaptureFixture
):
    untuned = json.loads((copied.folder / "report.json").read_text())
    main(["tune", *words, "--methods", "TIES", "DRM"])
    best = copied.folder / "tune" / "best.yaml"
    tuned = json.loads((copied.folder / "report.json").read_text())["tuned"]
    main(["merge", *copied.words, "--config", str(best)])
    report = json.loads((copied.folder / "report.json").read_text())
    assert {name: report["method"][name] for name in ("class_path", "init_args", "coefficients")} == {
        name: tuned[name] for name in ("class_path", "init_args", "coefficients")
    }
    assert report["scores"]["merged"] == tuned["scores"]
    assert report["intervals"]["merged"] == tuned["intervals"]
    assert report["normalized"] == tuned["normalized"]
    assert report["tuned"] == tuned, "a merge keeps what tune found"
    assert report["scores"]["individual"] == untuned["scores"]["individual"]


def test_methods_are_named_on_the_command_line(copied: Run, capsys: pytest.CaptureFixture):
    for words, message in (
        (["--methods", "DMR", "TIES"], "There is no method 'DMR'; the methods are DRM, TIES,"),
        (["--grid", "{DRM: {rank: [1]}}"], "DRM has no hyper-parameter 'rank'; it has direction, density,"),
        (["--search", "gird"], "search"),
        (["--num_samples", "0"], "num_samples must be at least 1, got 0."),
        (["--search", "gradient", "--methods", "IsoC"], "linear in them, which IsoC is not"),
        (["--search", "gradient", "--num_finalists", "3"], "The search 'gradient' does not take num_finalists"),
        (["--patience", "3"], "The search 'grid' does not take patience (give --search gradient with it)."),
        (["--search", "gradient", "--objective", "accuracy"], "objective"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["tune", *copied.words, *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (copied.folder / "tune").exists()


def test_an_unfinished_run_is_refused(unfinished: Run, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["tune", *unfinished.words])
    assert ended.value.code == 2
    assert "color, pet" in capsys.readouterr().err


def test_merge_takes_learned_coefficients_and_makes_the_same_model(copied: Run, capsys: pytest.CaptureFixture):
    options = ["--methods", "TaskArithmetic", "--initial_coefficient", "0.3", "--max_steps", "20"]
    main(["tune", *copied.words, "--search", "gradient", *options, "--learning_rate", "0.02"])
    said = " ".join(capsys.readouterr().out.split())
    folder = copied.folder / "tune"
    tuned = json.loads((copied.folder / "report.json").read_text())["tuned"]
    losses = pd.read_csv(folder / "learning.csv")["mean loss"]
    assert losses.min() < losses[0]
    assert "in 20 steps, by the tasks' own loss" in said
    (again,) = [line for line in commands(copied.folder / "config.yaml", {"tuned": tuned}) if "drm tune" in line]
    words = shlex.split(again)[4:]
    assert words[:4] == ["--search", "gradient", "--methods", '["lightning_drm.TaskArithmetic"]']
    main(["tune", *copied.words, *words])
    assert "These coefficients were learned before." in " ".join(capsys.readouterr().out.split())

    main(["merge", *copied.words, "--config", str(folder / "best.yaml")])
    report = json.loads((copied.folder / "report.json").read_text())
    same = ("class_path", "init_args", "coefficients", "overrides")
    assert {name: report["method"][name] for name in same} == {name: tuned[name] for name in same}
    assert report["scores"]["merged"] == tuned["scores"]
    assert report["normalized"] == tuned["normalized"]

    learned = json.loads((folder / "learned.json").read_text())["coefficients"]
    deltas = [load_file(copied.folder / "tasks" / task / "deltas.safetensors") for task in ("color", "pet")]
    base = BertModel.from_pretrained(copied.config.parent / "base").state_dict()
    merged = BertModel.from_pretrained(copied.folder / "merged").state_dict()
    for name, row in learned.items():
        short = name.removeprefix("model.encoder.")
        added = sum(round(value, 6) * of_task[name].double() for value, of_task in zip(row, deltas, strict=True))
        torch.testing.assert_close(merged[short].double(), base[short].double() + added, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in learned.values()}) > 30, "parameters have coefficients of their own"
