"""Runs with modules of a user's own: their metric is the score everywhere; what cannot be measured is refused."""

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassF1Score

from helpers.tiny import QUIET, Vectors, VectorTask
from lightning_drm import DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.kinds import TaskMetrics
from lightning_drm.training.run_folder import RunFolder

SETS = {"a": 1, "b": 2}


class F1Task(VectorTask):
    """Judged by its own macro F1."""

    score = "f1"

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.f1 = MulticlassF1Score(2, average="macro")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.f1.update(self(batch[0]), batch[1])
        self.log("test_f1", self.f1)


class Named(Vectors):
    """Batches that only its own module understands."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return {"x": batch[0], "y": batch[1].float()}


class Numbers(VectorTask):
    """A regression whose batches are dictionaries: there are no logits and classes to fall back to."""

    score = "mae"

    def __init__(self) -> None:
        super().__init__(num_classes=1)
        self.mae = MeanAbsoluteError()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch["x"])[:, 0], batch["y"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("mae", self.mae(self(batch["x"])[:, 0], batch["y"]) and self.mae)


def run(
    folder: Path, module: VectorTask, data: type[Vectors] = Vectors, command: str = "fit", **options: object
) -> dict:
    trainer = MergeTrainer(max_epochs=2, callbacks=[DRMMergeCallback(list(SETS), dirpath=folder)], **QUIET)
    getattr(trainer, command)(module, datamodule=MultiTaskDataModule({t: data(s) for t, s in SETS.items()}))
    return json.loads((folder / "report.json").read_text())


def macro_f1(guesses: Tensor, target: Tensor) -> float:
    scores = []
    for label in (0, 1):
        hits = float(((guesses == label) & (target == label)).sum())
        found = float((guesses == label).sum() + (target == label).sum())
        scores.append(2 * hits / found if found else 0.0)
    return sum(scores) / 2


def test_a_modules_own_metric_is_the_score_of_all_models(tmp_path: Path, capsys: pytest.CaptureFixture):
    report = run(tmp_path, F1Task())
    assert report["metrics"] == {task: {"name": "f1", "higher_is_better": True} for task in SETS}
    assert "accuracy" not in report
    session = DRMMergeCallback(list(SETS), dirpath=tmp_path).session
    session.restore()
    merged = session.fuse(module=F1Task())
    for task, seed in SETS.items():
        x, y = Vectors(seed).test.tensors
        finetuned = session.finetuned(F1Task(), task).task_module(task)
        for row, module in (("individual", finetuned), ("merged", merged.task_module(task))):
            expected = macro_f1(module(x).argmax(1), y)
            assert report["scores"][row][task] == pytest.approx(expected)
            low, high = report["intervals"][row][task]
            assert low < expected <= high
        assert report["scores"]["base"][task] is not None, "the head on the base is judged by the same metric"
    assert "f1 " in capsys.readouterr().out
    assert run(tmp_path, F1Task())["scores"] == report["scores"]
    assert "a: finetuned before (f1 " in capsys.readouterr().out


def test_a_regression_of_ones_own_needs_no_logits(tmp_path: Path):
    report = run(tmp_path, Numbers(), Named)
    assert report["metrics"]["a"] == {"name": "mae", "higher_is_better": False}
    assert report["scores"]["base"]["a"] is None, "its batches are its own affair"
    scores = report["scores"]
    assert report["normalized"]["a"] == pytest.approx(scores["individual"]["a"] / scores["merged"]["a"])
    assert scores["merged"]["average"] is None
    session = DRMMergeCallback(list(SETS), dirpath=tmp_path).session
    session.restore()
    module = session.fuse(module=Numbers()).task_module("b")
    x, y = Vectors(2).test.tensors
    assert scores["merged"]["b"] == pytest.approx(float((module(x)[:, 0] - y).abs().double().mean()), rel=1e-5)


class NeverTrained(F1Task):
    def training_step(self, batch, batch_idx):
        pytest.fail("it was to be refused before training")


class Misnamed(NeverTrained):
    score = "F1"


class Floats(NeverTrained):
    score = None
    test_step = VectorTask.test_step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class NoTest(NeverTrained):
    test_step = VectorTask.test_step


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Misnamed(),
            r"Task 'a' is to be judged by 'F1', but its test_step logs f1.*(\n.*)*'b' is to be judged by 'F1'",
        ),
        (Floats(), r"'a' cannot be measured by accuracy, the default: .* gives \(16,\) and torch.int64 \(16,\)\. Give"),
        (NoTest(), r"NoTest names 'f1' as its score, but has no test_step that could log it"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path: Path, module: VectorTask, message: str):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, module)
    assert RunFolder(tmp_path).missing(list(SETS)) == list(SETS)


def test_a_look_at_the_test_set_changes_no_training(tmp_path: Path):
    """The weights are those of fits before which nothing was measured."""
    template = F1Task()
    run(tmp_path, template)
    callback = DRMMergeCallback(list(SETS))
    for task, seed in SETS.items():
        L.seed_everything(0)
        trainer = L.Trainer(max_epochs=2, callbacks=[callback.for_task(task)], **QUIET)
        trainer.fit(copy.deepcopy(template), datamodule=Vectors(seed))
    for task, vector in callback.task_vectors.items():
        stored = RunFolder(tmp_path).load_task_vector(task)
        for name, delta in vector.deltas.items():
            assert torch.equal(torch.as_tensor(stored.deltas[name]), torch.as_tensor(delta))


class OtherScore(F1Task):
    """The same weights, judged by another metric."""

    score = "accuracy"

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def test_another_score_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    run(tmp_path, F1Task())
    report = run(tmp_path, OtherScore(), command="merge")
    assert report["metrics"]["a"]["name"] == "accuracy"
    assert report["intervals"]["merged"]["a"] is None, "batches log a number, which tells nothing of samples"
    printed = capsys.readouterr().out
    assert "a: its scores are of other test data, of another metric" in " ".join(printed.split())


class Shifted(Vectors):
    """Data whose hook moves the inputs far away, as a normalization on the device may."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + 100, batch[1]]


def test_the_head_on_the_base_sees_the_inputs_that_are_measured(tmp_path: Path):
    """Trained on other inputs, it would guess one class for all samples."""
    plain, shifted = run(tmp_path / "plain", F1Task(seed=0)), run(tmp_path / "shifted", F1Task(seed=0), Shifted)
    for task, seed in SETS.items():
        x, y = Vectors(seed).test.tensors
        constant = max(macro_f1(torch.full_like(y, label), y) for label in (0, 1))
        assert plain["scores"]["base"][task] > constant
        module = F1Task(seed=0)
        with torch.no_grad():
            features = module.backbone(x + 100).double()
        assert features.std(0).max() > 1e-6, "the case shows nothing"
        assert shifted["scores"]["base"][task] > constant


class BringsMetrics(Vectors):
    """A user's own data module that says what is measured."""

    def metrics(self) -> TaskMetrics:
        return TaskMetrics({"f1": MulticlassF1Score(2, average="macro")})


def test_own_data_may_bring_the_metrics(tmp_path: Path):
    report = run(tmp_path / "brought", VectorTask(), BringsMetrics)
    assert report["metrics"]["a"] == {"name": "f1", "higher_is_better": True}
    session = DRMMergeCallback(list(SETS), dirpath=tmp_path / "brought").session
    session.restore()
    x, y = Vectors(1).test.tensors
    module = session.finetuned(VectorTask(), "a").task_module("a")
    assert report["scores"]["individual"]["a"] == pytest.approx(macro_f1(module(x).argmax(1), y))
    with pytest.raises(
        ValueError, match=r"Both F1Task \(by its score, 'f1'\) and its data \(by their metrics\) say how"
    ):
        run(tmp_path / "both", F1Task(), BringsMetrics)
