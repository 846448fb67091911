"""Runs that were finetuned, and analyzed, once: one of two tiny tasks of texts, and one of three that conflict."""

import shutil
from pathlib import Path

import pytest

from helpers import three_tasks as three
from helpers.run import Run
from helpers.three_tasks import ThreeTasks
from helpers.tiny import save_run_config
from lightning_drm.cli.main import main

OF_DELTAS = ("pruning_profile", "sign_agreement", "spectrum", "alignment")


@pytest.fixture(scope="session")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After ``fit``, and ``analyze`` of what does not try many merges; only read."""
    config = save_run_config(tmp_path_factory.mktemp("analyzed"))
    main(["fit", "--config", str(config)])
    main(["analyze", "--config", str(config), "--split", "test", "--only", f"[{','.join(OF_DELTAS)},trajectory]"])
    return Run(config, config.parent / "run")


@pytest.fixture
def finetuned(analyzed: Run, tmp_path: Path) -> Run:
    """The same before ``analyze``, to write into."""
    return Run(analyzed.config, shutil.copytree(analyzed.folder, tmp_path / "run", ignore=lambda *_: ["analysis"]))


@pytest.fixture(scope="session")
def three_tasks(tmp_path_factory: pytest.TempPathFactory) -> ThreeTasks:
    """After ``fit``, each task with a snapshot; only its analyses are written."""
    return three.finetuned(tmp_path_factory.mktemp("three"))
