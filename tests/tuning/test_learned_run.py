"""`MergeTrainer.tune(search="gradient")`: what it learns, writes and says, and that test sets wait for the end."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from helpers.studied import TASKS, StudiedRun, make_data
from helpers.tiny import VectorTask
from lightning_drm import DRM, IsoC, TaskArithmetic
from lightning_drm.fusion import Override
from lightning_drm.tuning import CoefficientFit

FEW = {"search": "gradient", "max_steps": 40, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of this folder with heads that start alike each time, so that what is learned is the same."""
    run = StudiedRun(tmp_path_factory.mktemp("finished") / "run", make_data())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        template = VectorTask(lr=0.3)
    run.trainer().fit(template, datamodule=run.data)
    return run.folder


def learned(run: StudiedRun) -> dict[str, Any]:
    return json.loads((run.folder / "tune" / "learned.json").read_text())


def report(run: StudiedRun) -> dict[str, Any]:
    return json.loads((run.folder / "report.json").read_text())


def loss_by_hand(run: StudiedRun, coefficients: dict[str, list[float]], rows: dict[str, list[int]]) -> float:
    """The mean cross entropy over tasks, on some validation samples, in float64."""
    deltas = {
        task: {n: t.double() for n, t in load_file(run.folder / "tasks" / task / "deltas.safetensors").items()}
        for task in TASKS
    }
    total = 0.0
    for task in TASKS:
        module = VectorTask(lr=0.3).double()
        state = module.state_dict() | load_file(run.folder / "tasks" / task / "head.safetensors")
        for name, row in coefficients.items():
            for value, other in zip(row, TASKS, strict=True):
                state[name] = state[name].double() + value * deltas[other][name]
        module.load_state_dict(state)
        x, y = (tensor[rows[task]] for tensor in run.data.tasks[task].sets["validation"])
        total += float(torch.nn.functional.cross_entropy(module(x.double()), y).detach())
    return total / len(TASKS)


def test_what_is_learned_and_left_behind(run: StudiedRun, capsys: pytest.CaptureFixture):
    before = report(run)
    run.tune(**FEW, methods=["TaskArithmetic"], initial_coefficient=0.1)
    said = " ".join(capsys.readouterr().out.split())
    folder, found = run.folder / "tune", learned(run)
    assert {name: value for name, value in report(run).items() if name != "tuned"} == before

    names = {n for n, _ in VectorTask().named_parameters() if not n.startswith("head")}
    assert set(found["coefficients"]) == names
    assert [check["step"] for check in found["checks"]] == [0, 10, 20, 30, 40]
    assert found["num_samples"] == {task: [80, 80] for task in TASKS}
    best = min(found["checks"], key=lambda check: sum(check["losses"].values()))
    assert sum(best["losses"].values()) < sum(found["checks"][0]["losses"].values())

    tuned = report(run)["tuned"]
    assert (tuned["class_path"], tuned["init_args"]) == ("lightning_drm.TaskArithmetic", {"scale": 1.0})
    own = {override["match"]: override["coefficients"] for override in tuned["overrides"]}
    for name, row in found["coefficients"].items():
        assert list(own[name].values()) == [round(value, 6) for value in row]
    assert (tuned["num_steps"], tuned["best_step"]) == (40, best["step"])
    options = {"methods": ["lightning_drm.TaskArithmetic"], "coefficients": "layers", "objective": "labels"}
    assert tuned["options"] == {**options, **FEW, "initial_coefficient": 0.1, "patience": 5, "seed": 0}
    best_file = yaml.safe_load((folder / "best.yaml").read_text())["drm"]
    assert {o["match"]: o["coefficients"] for o in best_file["overrides"]} == own
    assert all(set(o) == {"match", "coefficients"} for o in best_file["overrides"])

    table = pd.read_csv(folder / "coefficients.csv")
    weight = table[table.parameter == "backbone.0.weight"]
    assert list(weight.task) == list(TASKS)
    assert list(weight.coefficient) == pytest.approx(found["coefficients"]["backbone.0.weight"])
    assert list(dict.fromkeys(table.parameter)) == [n for n, _ in VectorTask().named_parameters() if n in names]
    losses = pd.read_csv(folder / "learning.csv")
    assert list(losses["step"]) == [0, 10, 20, 30, 40]
    assert losses["mean loss"].min() == pytest.approx(sum(best["losses"].values()) / 2)
    for name in ("coefficients", "learning"):
        assert {(folder / f"{name}.{kind}").is_file() for kind in ("csv", "svg", "json")} == {True}
    trials = pd.read_csv(folder / "trials.csv")
    assert list(trials["method"]) == ["lightning_drm.TaskArithmetic", "lightning_drm.DRM"]
    assert tuned["validation"]["tuned"]["normalized"]["average"] == pytest.approx(trials["normalized average"][0])
    assert "each of 6 parameters in 40 steps, by the tasks' own loss" in said
    assert not (folder / "study.db").exists()

    run.tune(grid={"TaskArithmetic": {"scale": [0.5]}}, num_samples=60)
    assert sorted(path.stem for path in folder.glob("*.svg")) == ["TaskArithmetic"], "pictures of an earlier search go"
    assert "options" not in report(run)["tuned"]


def test_losses_are_those_of_independent_merges_on_samples_that_no_step_sees(
    run: StudiedRun, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list[torch.Tensor]] = {task: [] for task in TASKS}
    step = CoefficientFit.training_step

    def noted(self: CoefficientFit, batch: Any, batch_idx: int) -> torch.Tensor:
        for task in TASKS:
            seen[task].append(batch[task][0])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CoefficientFit, "training_step", noted)
    run.tune(**FEW, methods=["TaskArithmetic"], initial_coefficient=0.1)
    rest = {}
    for task in TASKS:
        used = {tuple(row.tolist()) for batch in seen[task] for row in batch}
        x, _ = run.data.tasks[task].sets["validation"]
        rest[task] = [place for place, row in enumerate(x) if tuple(row.tolist()) not in used]
        assert len(used) == len(rest[task]) == 80
    found = learned(run)
    start = {name: [0.1, 0.1] for name in found["coefficients"]}
    mean = [sum(check["losses"].values()) / 2 for check in found["checks"]]
    assert loss_by_hand(run, start, rest) == pytest.approx(mean[0], abs=1e-6)
    assert loss_by_hand(run, found["coefficients"], rest) == pytest.approx(min(mean), abs=1e-6)


def test_test_sets_are_asked_for_once_and_at_the_end(
    run: StudiedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def asked() -> list[int]:
        return [task.num_tested for task in run.data.tasks.values()]

    for task in run.data.tasks.values():
        real = task.test_dataloader

        def after_learning(real: Any = real) -> DataLoader:
            trials = run.folder / "tune" / "trials.csv"
            assert trials.is_file(), "a search looked at the test set"
            return real()

        monkeypatch.setattr(task, "test_dataloader", after_learning)
    run.tune(**FEW)
    assert asked() == [1, 1]
    first = report(run)["tuned"]
    capsys.readouterr()
    run.tune(**FEW)
    said = " ".join(capsys.readouterr().out.split())
    assert "These coefficients were learned before." in said
    assert "the test sets are not touched again" in said
    assert asked() == [1, 1]
    assert report(run)["tuned"] == first
    run.tune(**FEW, seed=1)
    assert "learned before" not in capsys.readouterr().out
    assert report(run)["tuned"]["coefficients"] != first["coefficients"]


def test_a_fit_that_was_killed_begins_anew_and_ends_alike(run: StudiedRun, monkeypatch: pytest.MonkeyPatch):
    run.tune(**FEW)
    undisturbed = learned(run)
    (run.folder / "tune" / "learned.json").unlink()
    step = CoefficientFit.training_step

    def killed(self: CoefficientFit, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 15:
            raise SystemExit(9)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CoefficientFit, "training_step", killed)
        with pytest.raises(SystemExit):
            run.tune(**FEW)
    assert not (run.folder / "tune" / "learned.json").exists()
    run.tune(**FEW)
    assert learned(run) == undisturbed


def test_it_starts_at_the_configured_merge_and_drm_can_be_learned_too(run: StudiedRun):
    method = DRM(density=0.5, scale=0.8)
    options = {
        "method": method,
        "coefficients": {"second": 1.5},
        "overrides": [Override("backbone.0.bias", rule="base")],
    }
    trainer = run.trainer(**options)
    trainer.tune(VectorTask(lr=0.3), run.data, search="gradient", max_steps=3, learning_rate=1e-6)
    found, tuned = learned(run), report(run)["tuned"]
    assert [check["step"] for check in found["checks"]] == [0, 3], "the last steps are judged, too"
    assert "backbone.0.bias" not in found["coefficients"], "the rule of an override holds on"
    assert tuned["init_args"]["density"] == 0.5
    assert tuned["init_args"]["scale"] == 1.0
    for row in found["coefficients"].values():
        assert row == pytest.approx([0.8, 1.2], abs=1e-4)
    assert tuned["validation"]["tuned"] == tuned["validation"]["untuned"], "nearly the same model"
    assert {"match": "backbone.0.bias", "rule": "base"} in yaml.safe_load(
        (run.folder / "tune" / "best.yaml").read_text()
    )["drm"]["overrides"]


def test_one_coefficient_for_each_task(run: StudiedRun):
    run.tune(**FEW, coefficients="each", methods=["TIES"])
    found, tuned = learned(run), report(run)["tuned"]
    rows = list(found["coefficients"].values())
    assert all(row == rows[0] for row in rows)
    assert list(tuned["coefficients"].values()) == [round(value, 6) for value in rows[0]]
    assert not tuned["overrides"]
    assert rows[0][0] != rows[0][1]


def test_the_entropy_needs_no_labels(finished: Path, run: StudiedRun):
    options = {**FEW, "objective": "entropy", "methods": ["TaskArithmetic"]}
    run.tune(**options)
    first = learned(run)
    assert report(run)["tuned"]["options"]["objective"] == "entropy"
    lowest = min(first["checks"], key=lambda check: sum(check["losses"].values()))
    assert sum(lowest["losses"].values()) < sum(first["checks"][0]["losses"].values())
    (run.folder / "tune" / "learned.json").unlink()
    for task in run.data.tasks.values():
        x, y = task.sets["validation"]
        task.sets["validation"] = (x, 1 - y)
    run.tune(**options)
    assert learned(run)["coefficients"] == first["coefficients"]


class Rated(VectorTask):
    """Rates; its targets are numbers."""

    def classify(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self(batch[0])[:, :1], batch[1].float()


def test_tasks_without_classes_are_refused_by_name(run: StudiedRun):
    with pytest.raises(ValueError, match=r"by entropy here: Task 'first' has no class logits.*; Task 'second' has no"):
        run.trainer().tune(Rated(lr=0.3), run.data, search="gradient", objective="entropy")
    assert not (run.folder / "tune").exists()


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(6), torch.tensor(0))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["IsoC"]}, "linear in them, which IsoC is not"),
        ({"grid": {"DRM": {"scale": [1.0]}}}, r"does not take grid \(give --search grid or tpe with it\)"),
        ({"num_trials": 3, "prune": False, "num_finalists": 2}, "not take num_finalists .*, prune .*, num_trials"),
        ({"coefficients": "one"}, r"coefficients one \(give --search grid or tpe with --coefficients one\)"),
        ({"learning_rate": 0.0, "patience": 0}, "patience must be at least 1, got 0; learning_rate must be above 0"),
        ({"initial_coefficient": float("nan")}, "initial_coefficient must be finite, got nan"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"search": "grid", "objective": "labels"}, r"'grid' does not take objective \(give --search gradient with"),
        ({"search": "tpe", "patience": 3}, r"'tpe' does not take patience \(give --search gradient with it\)"),
        ({"search": "tpe", "coefficients": "layers"}, "give --search gradient with --coefficients layers"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(run: StudiedRun, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run.tune(**{"search": "gradient", **options})
    assert not (run.folder / "tune").exists()


def test_what_cannot_be_learned_here_is_refused_before_anything_is_written(
    run: StudiedRun, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match="which IsoC is not"):
        run.trainer(method=IsoC()).tune(VectorTask(lr=0.3), run.data, search="gradient")
    half = StudiedRun(run.folder, run.data).trainer()
    half.strategy.precision_plugin = type(half)(precision="bf16-true", accelerator="cpu").strategy.precision_plugin
    with pytest.raises(ValueError, match="lost in half precision"):
        half.tune(VectorTask(lr=0.3), run.data, search="gradient")
    with pytest.raises(ValueError, match="no task adds anything to the base"):
        run.trainer(overrides=[Override("*", rule="base")]).tune(VectorTask(lr=0.3), run.data, search="gradient")
    monkeypatch.setattr(run.data.tasks["second"], "val_dataloader", lambda: DataLoader(Stream()))
    with pytest.raises(ValueError, match="Task 'second' has a validation loader that is no DataLoader of numbered"):
        run.tune(search="gradient")
    assert not (run.folder / "tune" / "learned.json").exists()


def test_a_sample_of_the_validation_sets_will_do(run: StudiedRun):
    run.tune(**FEW, num_samples=30)
    assert learned(run)["num_samples"] == {task: [15, 15] for task in TASKS}
    assert set(pd.read_csv(run.folder / "tune" / "trials.csv")["validation samples per task"]) == {"all"}


class Normed(VectorTask):
    def __init__(self) -> None:
        super().__init__(lr=0.3)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))


def test_statistics_of_batch_norms_are_estimated_and_not_learned(tmp_path: Path):
    run = StudiedRun(tmp_path / "run", make_data())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        template = Normed()
    run.trainer().fit(template, datamodule=run.data)
    run.trainer(method=TaskArithmetic()).tune(template, run.data, **FEW)
    found = learned(run)
    names = {"backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"}
    assert set(found["coefficients"]) == names
    tuned = report(run)["tuned"]
    assert {override["match"] for override in tuned["overrides"]} == names
    means = [sum(row[place] for row in found["coefficients"].values()) / 4 for place in range(2)]
    assert list(tuned["coefficients"].values()) == pytest.approx(means, abs=2e-6)
    mean = [sum(check["losses"].values()) for check in found["checks"]]
    assert min(mean) < mean[0]
