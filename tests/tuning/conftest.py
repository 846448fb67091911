"""A run of two small tasks that is finetuned once; what tunes takes a copy."""

import shutil
from pathlib import Path

import lightning as L
import pytest

from helpers.studied import StudiedRun, make_data
from helpers.tiny import VectorTask


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = StudiedRun(tmp_path_factory.mktemp("finished") / "run", make_data())
    L.seed_everything(0)  # heads are drawn, and other tests have drawn before
    run.trainer().fit(VectorTask(lr=0.3), datamodule=run.data)
    return run.folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> StudiedRun:
    return StudiedRun(shutil.copytree(finished, tmp_path / "run"), make_data())
