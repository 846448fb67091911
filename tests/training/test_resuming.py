"""Fits that are killed: they go on, and end as if nothing had happened. Real kills of real processes."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from helpers.signals import SignalAt, run_cli
from helpers.tiny import KINDS, QUIET, Vectors, VectorTask, save_run_config
from lightning_drm import Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.cli.main import main

pytestmark = pytest.mark.processes

CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose fits take 6 steps an epoch; dropout and shuffling make its result depend on random states."""
    path = save_run_config(tmp_path_factory.mktemp("resuming"))
    content = yaml.safe_load(path.read_text())
    content["model"]["init_args"]["dropout"] = 0.2
    content["trainer"] |= {"max_steps": 20, "enable_progress_bar": False, "logger": False, "enable_checkpointing": True}
    path.write_text(yaml.safe_dump(content))
    return path


def variant(
    config: Path, folder: Path, callbacks: list[dict[str, Any]], weights: str = "last", **trainer: object
) -> list[str]:
    """The words of a fit with other settings of the Trainer, in a run folder of its own."""
    drm = {"dirpath": str(folder / "run"), "weights": weights}
    content = {"trainer": {**trainer, "callbacks": callbacks}, "drm": drm}
    folder.mkdir(exist_ok=True)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(config), "--config", str(folder / "overlay.yaml")]


def checkpoint(**arguments: object) -> dict[str, Any]:
    return {"class_path": CHECKPOINT, "init_args": arguments}


def averaging(**arguments: object) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.8, **arguments}}


def signals(folder: Path, names: list[str], **when: object) -> dict[str, Any]:
    path = f"{SignalAt.__module__}.{SignalAt.__qualname__}"
    return {"class_path": path, "init_args": {"signals": names, "done": str(folder / "sent"), **when}}


def same_results(run: Path, other: Path) -> None:
    for task in KINDS:
        for name in ("deltas", "head"):
            ours, theirs = (load_file(folder / "tasks" / task / f"{name}.safetensors") for folder in (run, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{task}: {name} differ"
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, other)]
    assert reports[0] == reports[1]


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, object], str]] = {
    "Lightning's own checkpoint": ([], {}, "step=12"),
    "after the validation of each epoch": ([], {"limit_val_batches": 1.0}, "step=12"),
    "epochs instead of steps": ([], {"max_steps": -1, "max_epochs": 4}, "step=12"),
    "save_last": ([checkpoint(save_last=True)], {}, "(step=12|last)"),
    "the best of all": (
        [checkpoint(monitor="train_loss", mode="max", save_top_k=-1)],
        {"weights": "best"},
        "step=12",
    ),
    "the best, written after the last": (
        [checkpoint(filename="{step}-last"), checkpoint(monitor="train_loss", filename="{step}-best")],
        {"weights": "best"},
        "step=12-best",
    ),
    "averages": ([averaging()], {"weights": "averaged"}, "step=12"),
    "the last step's beside averages": ([averaging()], {}, "step=12"),
    "two of them": ([checkpoint(every_n_train_steps=4, save_top_k=-1), checkpoint(every_n_epochs=2)], {}, "step=12"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_fit_ends_as_an_undisturbed_one(
    config: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture
):
    callbacks, trainer, name = CASES[case]
    main(variant(config, tmp_path / "calm", callbacks, **trainer))
    kill = signals(tmp_path, ["SIGKILL"], step=16)
    disturbed = variant(config, tmp_path / "killed", [*callbacks, kill], **trainer)
    assert run_cli(*disturbed).returncode == -signal.SIGKILL
    capsys.readouterr()
    main(disturbed)
    said = capsys.readouterr().out
    assert re.search(rf"^color: going on from .*/tasks/color/checkpoints/.*{name}.*\.ckpt$", said, re.MULTILINE)
    assert "pet: going on" not in said
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


def test_checkpoints_inside_an_epoch_are_passed_over(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    callbacks = [checkpoint(every_n_train_steps=4, save_top_k=-1)]
    main(variant(config, tmp_path / "calm", callbacks))
    disturbed = variant(config, tmp_path / "killed", [*callbacks, signals(tmp_path, ["SIGKILL"], step=16)])
    assert run_cli(*disturbed).returncode == -signal.SIGKILL
    assert list((tmp_path / "killed/run/tasks/color/checkpoints").glob("*step=12*"))
    capsys.readouterr()
    main(disturbed)
    assert "going on" not in capsys.readouterr().out
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


def test_a_damaged_checkpoint_is_passed_over(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    callbacks = [checkpoint(save_top_k=-1)]
    main(variant(config, tmp_path / "calm", callbacks))
    disturbed = variant(config, tmp_path / "killed", [*callbacks, signals(tmp_path, ["SIGKILL"], step=16)])
    assert run_cli(*disturbed).returncode == -signal.SIGKILL
    (last,) = (tmp_path / "killed/run/tasks/color/checkpoints").glob("*step=12.ckpt")
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    main(disturbed)
    assert "step=6.ckpt" in capsys.readouterr().out
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


@pytest.mark.parametrize(("hook", "said"), [("on_train_end", "going on from"), ("on_fit_end", "measured now")])
def test_what_was_trained_is_not_trained_again(
    config: Path, tmp_path: Path, hook: str, said: str, capsys: pytest.CaptureFixture
):
    """Killed after the last checkpoint, before deltas are written; and after that, before they are measured."""
    main(variant(config, tmp_path / "calm", []))
    disturbed = variant(config, tmp_path / "killed", [signals(tmp_path, ["SIGKILL"], hook=hook)])
    assert run_cli(*disturbed).returncode == -signal.SIGKILL
    task = tmp_path / "killed" / "run" / "tasks" / "color"
    assert (task / "deltas.safetensors").exists() == (hook == "on_fit_end")
    assert not (task / "metrics.json").exists()
    before = {file.name: file.stat().st_mtime_ns for file in task.glob("*.safetensors")}
    capsys.readouterr()
    main(disturbed)
    assert said in capsys.readouterr().out.splitlines()[0]
    assert {name: (task / name).stat().st_mtime_ns for name in before} == before
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


def test_resuming_is_asked_for_and_refuses_other_settings(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    main(variant(config, tmp_path / "calm", []))
    disturbed = variant(config, tmp_path / "killed", [signals(tmp_path, ["SIGKILL"], step=16)])
    assert run_cli(*disturbed).returncode == -signal.SIGKILL
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*disturbed, "--trainer.max_steps", "19"])
    assert ended.value.code == 2
    assert "color: trainer.max_steps: 20 → 19" in capsys.readouterr().err
    main([*disturbed, "--resume", "false"])
    assert "going on" not in capsys.readouterr().out
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")
    assert not (tmp_path / "killed/run/tasks/color/begun.json").exists()


def test_a_killed_retraining_goes_on_too(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    fit = variant(config, tmp_path / "killed", [signals(tmp_path, ["SIGKILL"], step=16)])
    (tmp_path / "sent").touch()
    main(fit)
    (tmp_path / "sent").unlink()
    again = [*fit, "--retrain", "true", "--trainer.max_steps", "19", "--only", "color"]
    assert run_cli(*again).returncode == -signal.SIGKILL
    capsys.readouterr()
    main(again)
    assert re.search("color: going on from .*step=12.ckpt", capsys.readouterr().out)
    main([*again, "--only", "pet"])
    main(variant(config, tmp_path / "calm", [], max_steps=19))
    main([*fit, "--trainer.max_steps", "19"])
    same_results(tmp_path / "killed" / "run", tmp_path / "calm" / "run")


class Tunable(VectorTask):
    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()


class StopOnce(Callback):
    """Ctrl-C in the third epoch, where a file says so."""

    def __init__(self, armed: Path) -> None:
        self.armed = armed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2 and self.armed.exists():
            self.armed.unlink()
            raise KeyboardInterrupt


def test_runs_that_share_a_folder_of_checkpoints_keep_to_their_own(tmp_path: Path):
    """The second run neither removes the first one's, nor is continued by it."""

    def run(folder: str, lr: float, place: str = "checkpoints") -> dict[str, torch.Tensor]:
        L.seed_everything(0, verbose=False)  # the template's weights are drawn
        merge = DRMMergeCallback(["a", "b"], Average(), dirpath=tmp_path / folder)
        callbacks = [merge, ModelCheckpoint(tmp_path / place), StopOnce(tmp_path / "armed")]
        trainer = MergeTrainer(max_epochs=4, callbacks=callbacks, **{**QUIET, "enable_checkpointing": True})
        trainer.fit(Tunable(lr), datamodule=MultiTaskDataModule({"a": Vectors(1), "b": Vectors(2)}), base_batches=0)
        return load_file(tmp_path / folder / "tasks/a/deltas.safetensors")

    calm = run("calm", 0.01, "other")
    (tmp_path / "armed").touch()
    with pytest.raises(SystemExit):
        run("first", 0.01)
    (kept,) = (tmp_path / "checkpoints" / "a").glob("*.ckpt")
    foreign = kept.with_name("foreign.ckpt")
    foreign.write_text("of another program")
    second = run("second", 0.5)
    assert kept.exists()
    assert foreign.exists()
    first = run("first", 0.01)
    assert all(torch.equal(first[name], calm[name]) for name in calm)
    assert not any(torch.equal(first[name], second[name]) for name in calm)
