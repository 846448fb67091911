"""Several processes in one run folder: real fits of tiny models, side by side and killed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.signals import start_cli
from helpers.tiny import save_run_config
from lightning_drm.cli.main import main

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_config(tmp_path_factory.mktemp("concurrent"))


def test_a_fit_keeps_others_from_its_task_and_a_kill_leaves_it_undone(config: Path, capsys: pytest.CaptureFixture):
    run = config.parent / "run"
    fit = ["fit", "--config", str(config)]
    endless = [*fit, "--only", "pet", "--trainer.max_steps", "1000000000"]
    other = start_cli(*endless, folder=config.parent)
    try:
        deadline = time.monotonic() + 60
        while not (run / "tasks" / ".pet.lock").exists():
            assert other.exitcode is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert refusal([*fit, "--only", "pet"], capsys) == busy(run)
        assert refusal(fit, capsys) == busy(run), "one task is at work"
        main([*fit, "--only", "color"])
        assert "pet still to be finetuned" in capsys.readouterr().out
        assert other.exitcode is None, "the fit of another task does not disturb it"
    finally:
        other.kill()
        other.join()
    assert "has no finetune of pet" in refusal(["merge", "--config", str(config)], capsys)
    main([*fit, "--only", "pet"])
    main(["merge", "--config", str(config)])
    assert json.loads((run / "report.json").read_text())["accuracy"]["individual"]["average"] > 0.9
    left = [str(path.relative_to(run)) for path in run.rglob(".*")]
    assert not left, "locks and half-written files are gone"


def test_a_merge_waits_for_no_fit(config: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    """A task that is done, but finetuned again: its files may change at any moment."""
    run = tmp_path / "run"
    command = ["--config", str(config), "--drm.dirpath", str(run)]
    main(["fit", *command, "--trainer.max_steps", "1"])
    with held(run / "tasks" / ".pet.lock"):
        assert refusal(["merge", *command], capsys) == busy(run)
        assert refusal(["test", *command], capsys) == busy(run)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Another process holds a lock."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.communicate(b"\n")


def busy(run: Path) -> str:
    return f"lightning-drm: Another process is at work on task 'pet' of {run}: wait until it has ended, or stop it.\n"


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err
