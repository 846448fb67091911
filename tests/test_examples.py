"""The examples run, and do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from helpers.tiny import save_run_config
from helpers.warm import python

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_cnn_two_tasks_merges_a_plain_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    accuracy = runpy.run_path(str(EXAMPLES / "cnn_two_tasks.py"))["main"]()
    assert accuracy["individual"]["digit"] > 0.85
    assert accuracy["individual"]["odd"] > 0.9
    # Better than guessing the most frequent class on both tasks at once, with one backbone.
    assert accuracy["merged"]["digit"] > 0.3
    assert accuracy["merged"]["odd"] > 0.6


@pytest.mark.processes
def test_slurm_array_and_merge(tmp_path: Path):
    """The scripts that SLURM would run, run by the stand-ins; what they find of SLURM is its variables."""
    config = save_run_config(tmp_path)
    slurm = EXAMPLES / "slurm"
    scripts = Path(sys.executable).parent  # where lightning-drm is
    path = os.pathsep.join([str(slurm / "local"), str(scripts), os.environ["PATH"]])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("drm: {coefficients: {color: 0.75}}")
    command = [slurm / "submit.sh", f"{config},{overlay}", "color", "pet"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=200)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tasks"] == ["color", "pet"]
    assert report["accuracy"]["individual"]["average"] > 0.9
    assert report["method"]["coefficients"] == {"color": 0.75, "pet": 1.0}, "the second file is read, too"
    outputs = {file.name: file.read_text() for file in tmp_path.glob("*.out")}
    assert len(outputs) == 3, "two jobs of the array, and the merge"
    assert sum(name.startswith("merge-") for name in outputs) == 1
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.processes
def test_slurm_stand_in_refuses_what_depends_on_a_failure(tmp_path: Path):
    (tmp_path / "fails.sbatch").write_text("#!/bin/bash\n#SBATCH --array=0-1\nexit $SLURM_ARRAY_TASK_ID\n")
    sbatch = [EXAMPLES / "slurm" / "local" / "sbatch", "--parsable"]

    def submit(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run([*sbatch, *options, "fails.sbatch"], cwd=tmp_path, capture_output=True, text=True)

    job = submit().stdout.strip()
    assert submit("--array=0", f"--dependency=afterok:{job}").stderr.startswith(f"sbatch: job {job} failed")
    assert submit("--exclusive").returncode == 2, "options that it does not know are not ignored"


def _study(folder: Path, *options: str) -> str:
    return _script("run.py", f"--folder={folder / 'runs'}", f"--output={folder / 'out'}", *options)


def _script(name: str, *options: str) -> str:
    """What a script of the study prints."""
    done = python(EXAMPLES / "study" / name, *options, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_study_goes_on_where_it_was_and_shows_what_its_runs_found(tmp_path: Path):
    config = save_run_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    content["drm"]["snapshots"] = [20]
    content["trainer"]["logger"] = False
    config.write_text(yaml.safe_dump(content))
    grids = {
        "DRM": {"direction": ["horizontal", "vertical"], "density": [0.2, 1.0], "scale": [1.0, 2.0]},
        "TaskArithmetic": {"scale": [0.1, 0.5]},
    }
    options = ["--seeds=[0]", f"--finetuning={json.dumps({'full': [str(config)]})}", f"--grids={json.dumps(grids)}"]
    said = _study(tmp_path, *options, "--num_samples=8").splitlines()
    assert sorted(line.rpartition(" took ")[0] for line in said[:-1]) == sorted(
        f"full-0: {command}" for command in ("fit", "tune", "compare", "analyze")
    )
    assert _study(tmp_path, *options, "--num_samples=8").splitlines() == said[-1:], "nothing is done twice"

    out = tmp_path / "out"
    scores = pd.read_csv(out / "methods.csv")
    found = scores[(scores["method"] == "DRM-H") & (scores["setting"] == "default")]
    merged = json.loads((tmp_path / "runs" / "full-0" / "report.json").read_text())["normalized"]["average"]
    assert found["normalized average (fraction)"].tolist() == pytest.approx([merged])
    results = (out / "results.md").read_text()
    row = next(line for line in results.splitlines() if line.startswith("| DRM-H |"))
    assert row.split(" | ")[2] == f"{100 * merged:.1f}"
    tuned = scores[scores["setting"] == "tuned"].set_index("method")["title"]
    assert set(tuned.index) == {"DRM-H", "DRM-V", "TaskArithmetic"}
    assert tuned["TaskArithmetic"].startswith("TaskArithmetic, scale 0."), "neither of the two values is the default"
    for file in re.findall(r"\]\((.*?)\)", results):
        assert (out / file).is_file()


@pytest.mark.processes
def test_later_methods_of_the_study(tmp_path: Path):
    config = save_run_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["logger"] = False
    config.write_text(yaml.safe_dump(content))
    options = [f"--folder={tmp_path / 'runs'}", f"--output={tmp_path / 'out'}", "--seeds=[0]", "--costs=false"]
    grids = {
        "DRM": {"direction": ["horizontal"], "density": [0.1, 0.2]},
        "RegMean": {"alpha": [0.5]},
        "TIES": {"space": ["entries", "core"], "density": [0.4]},
        "SVC of DRM": {"alpha": [0.5], "method.direction": ["horizontal"], "method.density": [0.1]},
    }
    options += [f"--grids={json.dumps(grids)}", "--num_samples=8", "--learned=[labels]"]
    finetuning = f"--finetuning={json.dumps({'full': [str(config)]})}"
    _script("later.py", *options, finetuning)
    both = pd.read_csv(tmp_path / "out" / "later_methods.csv").set_index("method")
    found = json.loads((tmp_path / "runs" / "full-0" / "report.json").read_text())["methods"]
    table, tuned = both[both["setting"] == "default"], both[both["setting"] == "tuned"]
    assert len(table) == 23
    learned = "Task arithmetic, λ learned from labels"
    assert set(tuned.index) == {"DRM-H", "RegMean", "TIES", "SVC of DRM-H", learned}
    settings = {"RegMean": "RegMean, alpha 0.5", "SVC of DRM-H": "SVC of DRM, horizontal, density 0.1, alpha 0.5"}
    for name, title in settings.items():
        assert tuned.loc[name, "share"] == pytest.approx(100 * found[title]["normalized"]["average"])
    for name, title in {"DRM-H": "DRM, horizontal, density 0.2", "RegMean++": "RegMean, propagate"}.items():
        assert table.loc[name, "share"] == pytest.approx(100 * found[title]["normalized"]["average"])
    assert table.loc["DRM-H", "gap"] == 0


def test_study_says_a_difference_only_beyond_the_noise_of_seeds():
    mean = runpy.run_path(str(EXAMPLES / "study" / "report.py"))["mean"]
    one, level, below = mean([0.1]), mean([0.1, 0.2, 0.3]), mean([-0.1, -0.2, -0.15])
    assert (one.shown(), one.side) == ("10.0", 0)
    assert (level.shown(signed=True), level.side) == ("+20.0 ±24.8", 0)  # 4.3027 * 10 / sqrt(3)
    assert (below.shown(), below.side) == ("-15.0 ±12.4", -1)
