"""A run of two tiny tasks that was finetuned, merged and analyzed once, on its test sets."""

import shutil
from pathlib import Path

import pytest
from helpers.run import Run
from helpers.tiny import save_run_config

from lightning_drm.cli.main import main


@pytest.fixture(scope="session")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After ``fit`` and ``analyze``; only read."""
    config = save_run_config(tmp_path_factory.mktemp("analyzed"))
    main(["fit", "--config", str(config)])
    main(["analyze", "--config", str(config), "--split", "test"])
    return Run(config, config.parent / "run")


@pytest.fixture
def finetuned(analyzed: Run, tmp_path: Path) -> Run:
    """The same before ``analyze``, to write into."""
    return Run(analyzed.config, shutil.copytree(analyzed.folder, tmp_path / "run", ignore=lambda *_: ["analysis"]))
