"""SIGTERM and Ctrl-C in the middle of a run, sent to real processes; a job that goes back into SLURM's queue."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from helpers.signals import SignalAll, SignalAt, run_cli, start_cli
from helpers.tiny import save_run_config
from lightning_drm.cli.main import main

pytestmark = pytest.mark.processes

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_config(tmp_path_factory.mktemp("interrupted"))


def fit(config: Path, folder: Path, signals: list[str], **when: object) -> list[str]:
    """The words of a fit that gets signals when it has come so far."""
    path = f"{SignalAt.__module__}.{SignalAt.__qualname__}"
    sender = {"class_path": path, "init_args": {"signals": signals, "done": str(folder / "sent"), **when}}
    content = {"trainer": {"callbacks": [sender], "logger": False}, "drm": {"dirpath": str(folder / "run")}}
    (folder / "overlay.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(config), "--config", str(folder / "overlay.yaml")]


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("when", [{"step": 9}, {"hook": "on_train_end"}], ids=["in training", "after it"])
def test_a_signal_ends_a_fit_with_its_code(config: Path, tmp_path: Path, name: str, code: int, when: dict[str, object]):
    words = fit(config, tmp_path, [name], **when)
    stopped = run_cli(*words)
    assert stopped.returncode == code
    said = f"lightning-drm: Stopped by {name}: task 'color' was not finished; the same command continues."
    assert last_line(stopped) == said
    assert stopped.stderr.count("lightning-drm: ") == 1
    assert not (tmp_path / "run/tasks/color/metrics.json").exists()
    assert not list((tmp_path / "run").rglob(".*")), "no locks and no half-written files"
    main(words)
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize(
    "strategy", [[], ["--trainer.devices", "2", "--trainer.strategy", "ddp"]], ids=["alone", "ddp"]
)
def test_a_signal_from_outside_ends_a_fit(config: Path, tmp_path: Path, name: str, code: int, strategy: list[str]):
    """It reaches all processes, as from a terminal or from SLURM."""
    words = [*fit(config, tmp_path, ["SIGUSR2"], step=10**9), *strategy, "--trainer.max_steps", "1000000000"]
    process = start_cli(*words, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/tasks/color/begun.json").exists():
        assert process.exitcode is None, (tmp_path / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # into the training, or not: both must end alike
    os.killpg(process.pid, signal.Signals[name])
    process.join(60)
    assert process.exitcode == code
    assert f"Stopped by {name}: task 'color' was not finished" in (tmp_path / "err").read_text()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_ranks_that_wait_for_gradients(config: Path, tmp_path: Path, name: str, code: int):
    path = f"{SignalAll.__module__}.{SignalAll.__qualname__}"
    sender = {"class_path": path, "init_args": {"name": name, "step": 4}}
    trainer = {"callbacks": [sender], "logger": False, "devices": 2, "strategy": "ddp"}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": trainer, "drm": {"dirpath": str(tmp_path)}}))
    done = run_cli("fit", "--config", str(config), "--config", str(tmp_path / "overlay.yaml"))
    assert f"Stopped by {name}: task 'color' was not finished" in done.stderr
    assert done.returncode == code


def test_a_requeued_job_is_left_to_lightning_and_goes_on(config: Path, tmp_path: Path):
    """SLURM sends SIGUSR1 before the time is up; Lightning saves, asks for the queue, and gets SIGTERM for it."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    environment = {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    words = fit(config, tmp_path, ["SIGUSR1", "SIGTERM"], step=9)
    first = run_cli(*words, **environment)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert first.returncode == 0, "what Lightning leaves it with"
    assert "Stopped" not in first.stderr
    (saved,) = (tmp_path / "run/tasks/color").glob("hpc_ckpt_*.ckpt")
    second = run_cli(*words, **environment)
    assert second.returncode == 0
    assert f"color: going on from {saved}" in second.stdout.replace("\n", "")
    assert "pet: going on" not in second.stdout
    assert (tmp_path / "run" / "report.json").exists()


def test_a_job_that_slurm_ends_at_once_has_failed(config: Path, tmp_path: Path):
    stopped = run_cli(*fit(config, tmp_path, ["SIGTERM"], step=9), **SLURM)
    assert stopped.returncode == 143
    assert "task 'color' was not finished" in last_line(stopped)
