"""Mistakes on the command line: one helpful sentence each, and exit code 2."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import yaml
from torch import nn

from helpers.mistakes import METHODS, said
from helpers.run import Run
from helpers.tiny import Vectors, VectorTask
from lightning_drm import DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.cli.main import main


@pytest.fixture(params=["fit", "merge", "files"])
def words(request: pytest.FixtureRequest, finished: Run, tmp_path: Path) -> list[str]:
    """A command line without a mistake, up to here."""
    if request.param == "files":
        return ["merge", "--base", "BASE", "--models.a", "A", "--output", str(tmp_path / "out")]
    return [request.param, *finished.words]


@pytest.mark.parametrize("name", ["DMR", "lightning_drm.DMR", "no_package.DMR"])
def test_a_method_that_does_not_exist(words: list[str], name: str, capsys: pytest.CaptureFixture):
    line = said([*words, "--drm.method", name], capsys)
    assert line.startswith(f"drm.method: There is no method '{name}'; the methods are {METHODS}, and one of your own")


def test_a_class_that_is_no_method(words: list[str], capsys: pytest.CaptureFixture):
    line = said([*words, "--drm.method", "torch.nn.Linear"], capsys)
    assert line.startswith(f"drm.method: torch.nn.Linear is not a method; the methods are {METHODS}")


def test_a_density_that_is_no_number(words: list[str], capsys: pytest.CaptureFixture):
    assert said([*words, "--drm.method.density", "a"], capsys) == "drm.method.density: expected a number, got 'a'."


@pytest.fixture
def with_model(finished: Run, tmp_path: Path) -> Callable[[object], list[str]]:
    """A command line whose configuration has another model."""

    def write(model: object) -> list[str]:
        content = {**yaml.safe_load(finished.config.read_text()), "model": model}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return ["fit", "--config", str(tmp_path / "config.yaml"), "--drm.dirpath", str(tmp_path / "run")]

    return write


def test_a_model_without_arguments(with_model: Callable[[object], list[str]], capsys: pytest.CaptureFixture):
    line = said(with_model({"class_path": "lightning_drm.TransformerTask"}), capsys)
    assert line == "model: lightning_drm.TransformerTask needs init_args with backbone."
    line = said(with_model({"backbone": "bert-base-uncased"}), capsys)
    assert line == "model: expected class_path with the module's class, and init_args with its arguments."


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A module written for ``pytorch_lightning``, which need not be installed."""
    base = type("LightningModule", (nn.Module,), {"__module__": "pytorch_lightning.core.module"})
    mine = type("Mine", (base,), {"__module__": "written_long_ago"})
    module = types.ModuleType("written_long_ago")
    module.Mine = mine
    monkeypatch.setitem(sys.modules, "written_long_ago", module)
    return mine


def test_a_module_of_another_lightning(
    other_library: type[nn.Module], with_model: Callable[[object], list[str]], capsys: pytest.CaptureFixture
):
    line = said(with_model({"class_path": "written_long_ago.Mine"}), capsys)
    assert line.startswith("model: written_long_ago.Mine comes from pytorch_lightning, whose classes do not fit")
    assert line.endswith("take those of lightning.pytorch (`import lightning.pytorch as pl`).")


def test_a_module_of_another_lightning_in_python(other_library: type[nn.Module], tmp_path: Path):
    trainer = MergeTrainer(callbacks=[DRMMergeCallback(["a"], dirpath=tmp_path)], logger=False, accelerator="cpu")
    for data in (Vectors(1), MultiTaskDataModule({"a": Vectors(1)})):
        with pytest.raises(ValueError, match=r"written_long_ago\.Mine comes from pytorch_lightning"):
            trainer.fit(other_library(), datamodule=data)


def test_a_trainer_of_another_lightning():
    """Which calls hooks of this callback, too."""
    trainer = type("Trainer", (L.Trainer,), {"__module__": "pytorch_lightning.trainer.trainer"})
    merge = DRMMergeCallback(["a"])
    with pytest.raises(ValueError, match=r"pytorch_lightning\.trainer\.trainer\.Trainer comes from pytorch_lightning"):
        trainer(callbacks=[merge], logger=False, accelerator="cpu").fit(VectorTask(), Vectors(0))
    assert merge.missing == ["a"]


def test_tasks_keep_their_logs_and_checkpoints_apart(tmp_path: Path):
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs"), "name": "mine"}},
    ]
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), "every_n_epochs": 2}},
    ]
    content = {
        "model": {"class_path": f"{VectorTask.__module__}.VectorTask"},
        "data": {"tasks": {t: {"class_path": f"{Vectors.__module__}.Vectors", "init_args": {"seed": i}} for i, t in
                           enumerate("ab")}},
        "drm": {"dirpath": str(tmp_path / "run")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": loggers, "callbacks": callbacks,
                    "default_root_dir": str(tmp_path / "root"), "enable_model_summary": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    for task in "ab":
        assert (tmp_path / "logs" / "mine" / task / "version_0" / "hparams.yaml").is_file()
        assert (tmp_path / "run" / "tasks" / task / "checkpoints" / "last.ckpt").is_file()
        assert len(list((tmp_path / "kept" / task).glob("*.ckpt"))) == 1
    assert not list((tmp_path / "logs").rglob("*.ckpt"))
