"""The examples run, and do what they say."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import save_run_config

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
    command = [slurm / "submit.sh", config, "color", "pet"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=200)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tasks"] == ["color", "pet"]
    assert report["accuracy"]["individual"]["average"] > 0.9
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
