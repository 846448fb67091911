"""A finished run of three tasks on vectors, made once. It is only read; who writes takes a copy."""

import shutil
from pathlib import Path

import pytest
from helpers.vectors_run import TASKS, VectorsRun


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> VectorsRun:
    """After ``fit``; only read."""
    run = VectorsRun(tmp_path_factory.mktemp("vectors") / "run")
    run.fit()
    assert run.report()["tasks"] == TASKS
    return run


@pytest.fixture
def copied(finished: VectorsRun, tmp_path: Path) -> VectorsRun:
    """The same, to write into."""
    return VectorsRun(shutil.copytree(finished.folder, tmp_path / "run"))
