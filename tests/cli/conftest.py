"""A finished run and some finetuned models, each made once. They are only read; who writes takes a copy."""

import shutil
from pathlib import Path

import pytest

from helpers import models
from helpers.run import Run
from helpers.tiny import save_run_config
from lightning_drm.cli.main import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After ``fit``; only read."""
    config = save_run_config(tmp_path_factory.mktemp("run"))
    main(["fit", "--config", str(config)])
    return Run(config, config.parent / "run")


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    """The same, to write into."""
    return Run(finished.config, shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.fixture
def unfinished(finished: Run, tmp_path: Path) -> Run:
    """The same before ``fit``, to write into."""
    return Run(finished.config, tmp_path / "run")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two finetunes of it and an adapter; only read."""
    folder = tmp_path_factory.mktemp("files")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for seed, task in enumerate(["sst2", "rte"], 1):
        models.finetune("bert", base, seed).save_pretrained(folder / task)
    models.adapter("bert", base, 3).save_pretrained(folder / "adapter")
    return folder
