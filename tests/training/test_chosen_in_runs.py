"""Chosen weights in whole runs: scores are of the weights that were stored, and a changed choice is noticed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tiny import Vectors, VectorTask
from lightning_drm import Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule

SEEDS = {"one": 0, "two": 1}


class Template(VectorTask):
    """Learns, and then forgets again: its loss is least after the second of four epochs."""

    def __init__(self) -> None:
        super().__init__(lr=0.5)
        self.save_hyperparameters()

    def configure_task(self, num_classes: int) -> None:
        self.head = nn.Linear(5, num_classes)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", [3.0, 1.0, 2.0, 4.0][self.current_epoch])
        return loss if self.current_epoch < 2 else -loss


def run(folder: Path, weights: str, callbacks: list[Callback], **arguments: Any) -> MultiTaskDataModule:
    data = MultiTaskDataModule({name: Vectors(seed) for name, seed in SEEDS.items()})
    merge = DRMMergeCallback(data.task_names, Average(), folder, weights=weights)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = MergeTrainer(callbacks=[merge, *callbacks], max_epochs=4, **settings)
    trainer.fit(Template(), datamodule=data, base_batches=0, **arguments)
    return data


CHOICES: dict[str, Any] = {
    "last": lambda: [EMAWeightAveraging(decay=0.95)],
    "best": lambda: [ModelCheckpoint(monitor="epoch_loss")],
    "averaged": lambda: [EMAWeightAveraging(decay=0.95)],
}


def accuracy(state: dict[str, torch.Tensor], seed: int) -> float:
    module = VectorTask().double()
    module.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    x, y = Vectors(seed).test.tensors
    return float((module(x.double()).argmax(1) == y).double().mean())


def stored(folder: Path, task: str) -> dict[str, torch.Tensor]:
    """The weights that were stored of a task, put together by hand."""
    deltas = load_file(folder / "tasks" / task / "deltas.safetensors")
    head = load_file(folder / "tasks" / task / "head.safetensors")
    base = {f"backbone.{name}": tensor.double() for name, tensor in VectorTask().backbone.state_dict().items()}
    return {name: tensor + deltas[name] for name, tensor in base.items()} | head


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chosen")
    for weights, callbacks in CHOICES.items():
        run(folder / weights, weights, callbacks())
    return folder


class Averaging(Template):
    """Brings its own callback."""

    def configure_callbacks(self) -> list[Callback]:
        return [EMAWeightAveraging(decay=0.95)]


def test_callbacks_of_the_module_count_too(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "Template", Averaging)
    for weights in ("last", "averaged"):
        run(tmp_path / weights, weights, [])
        ours, theirs = (
            json.loads((folder / weights / "report.json").read_text())["accuracy"] for folder in (tmp_path, runs)
        )
        assert ours == theirs


@pytest.mark.parametrize("weights", CHOICES)
def test_the_individual_score_is_of_the_weights_that_were_stored(runs: Path, weights: str):
    scores = json.loads((runs / weights / "report.json").read_text())["accuracy"]["individual"]
    assert {task: scores[task] for task in SEEDS} == pytest.approx(
        {task: accuracy(stored(runs / weights, task), seed) for task, seed in SEEDS.items()}
    )


def test_each_choice_has_weights_and_scores_of_its_own(runs: Path):
    reports = [json.loads((runs / weights / "report.json").read_text())["accuracy"] for weights in CHOICES]
    assert len({json.dumps(report["individual"]) for report in reports}) == 3
    checkpoint = next((runs / "best/tasks/one/checkpoints").glob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    for name, tensor in stored(runs / "best", "one").items():
        torch.testing.assert_close(tensor.double(), state[name].double(), rtol=0, atol=1e-6)


CHANGES = {
    "other weights": ("last", "best", [ModelCheckpoint(monitor="epoch_loss")], "weights: last → best"),
    "no longer": ("best", "last", [], r"weights: best → last; weights.monitor: epoch_loss \(min\) → not set"),
    "other best": (
        "best",
        "best",
        [ModelCheckpoint(monitor="epoch_loss", mode="max")],
        r"\(min\) → epoch_loss \(max\)",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_choice_is_noticed(runs: Path, case: str):
    before, after, callbacks, message = CHANGES[case]
    with pytest.raises(ValueError, match=rf"finetunes made with other settings:\n  one: .*{message}"):
        run(runs / before, after, callbacks)


def test_a_run_of_before_there_was_a_choice_is_taken_up(tmp_path: Path, capsys: pytest.CaptureFixture):
    run(tmp_path, "last", [])
    for task in SEEDS:
        path = tmp_path / "tasks" / task / "deltas.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        settings = json.loads(metadata["settings"])
        del settings["weights"]
        save_file(load_file(path), path, {**metadata, "settings": json.dumps(settings)})
    capsys.readouterr()
    run(tmp_path, "last", [])
    assert capsys.readouterr().out.count("not trained again") == 2


def test_a_run_that_cannot_have_the_chosen_weights_trains_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="has no ModelCheckpoint with a monitor"):
        run(tmp_path, "best", [])
    assert not list(tmp_path.rglob("*.ckpt"))
