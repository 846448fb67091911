"""Snapshots are what a shorter fit would have ended with, and the fit does not notice them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.on_cpu import FSDPOnCPU
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRM, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.deltas import load_task_vector
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.snapshots import SnapshotPlan, TakeSnapshots

TASKS = ["a", "b"]


class DroppingTask(VectorTask):
    """Its training draws random numbers, and buffers change in it."""

    def __init__(self, lora: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(*self.backbone, nn.BatchNorm1d(5), nn.Dropout(0.2))
        if lora:
            inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"]), self.backbone)


class Validated(Vectors):
    """Its test set is its validation set, too."""

    def val_dataloader(self) -> DataLoader:
        return self.test_dataloader()


def fit(
    run: Path, *, lora: bool = False, snapshots: tuple[int, ...] = (), every: int | None = None, **arguments: object
) -> None:
    """One task, with the callback alone."""
    merge = DRMMergeCallback(["a"], dirpath=run, snapshots=snapshots, snapshot_every_n_epochs=every)
    seed_everything(3, verbose=False)
    module = DroppingTask(lora)
    resume = arguments.pop("resume", None)
    callbacks = [merge.for_task("a"), *arguments.pop("callbacks", [])]
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 3, **arguments})
    trainer.fit(module, Vectors(1), ckpt_path=resume)


def tensors(folder: Path) -> dict[str, Tensor]:
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("deltas", "head")}
    return {f"{file}:{name}": tensor for file, content in files.items() for name, tensor in content.items()}


def same(ours: Path, theirs: Path) -> bool:
    first, second = tensors(ours), tensors(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(run: Path, task: str = "a") -> list[int]:
    return sorted(int(folder.name) for folder in (run / "tasks" / task / "snapshots").glob("*"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_snapshot_is_what_a_shorter_fit_ends_with_and_the_fit_goes_on_undisturbed(tmp_path: Path, lora: bool):
    """Vectors has 4 batches an epoch."""
    fit(tmp_path / "plain", lora=lora)
    fit(tmp_path / "run", lora=lora, snapshots=(3, 6))
    assert steps(tmp_path / "run") == [3, 6]
    assert same(tmp_path / "run/tasks/a", tmp_path / "plain/tasks/a")
    for step in (3, 6):
        fit(tmp_path / f"short{step}", lora=lora, max_steps=step)
        assert same(tmp_path / f"run/tasks/a/snapshots/{step}", tmp_path / f"short{step}/tasks/a")
        assert load_task_vector(tmp_path / f"run/tasks/a/snapshots/{step}").num_steps == step
    assert load_task_vector(tmp_path / "run/tasks/a").num_steps == 12
    assert not same(tmp_path / "run/tasks/a/snapshots/3", tmp_path / "run/tasks/a/snapshots/6")


def test_epochs_end_in_snapshots_and_batches_that_wait_for_others_take_none(tmp_path: Path):
    fit(tmp_path / "epochs", every=2, max_epochs=5)
    assert steps(tmp_path / "epochs") == [8, 16]
    fit(tmp_path / "accumulated", snapshots=(2, 3), accumulate_grad_batches=2)
    fit(tmp_path / "short", max_steps=2, accumulate_grad_batches=2)
    assert steps(tmp_path / "accumulated") == [2, 3]
    assert same(tmp_path / "accumulated/tasks/a/snapshots/2", tmp_path / "short/tasks/a"), "buffers change by batch"


class StopAt(Callback):
    """Ends the process's fit after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyError("crash")


def test_a_resumed_fit_keeps_the_snapshots_it_has_passed_and_a_new_one_none(tmp_path: Path):
    run = tmp_path / "run"
    saving = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)]
    with pytest.raises(KeyError, match="crash"):
        fit(run, snapshots=(3, 6, 9), callbacks=[StopAt(7), *saving], enable_checkpointing=True)
    assert steps(run) == [3, 6]
    before = (run / "tasks/a/snapshots/3/deltas.safetensors").stat().st_mtime_ns
    (run / "tasks/a/snapshots/6/deltas.safetensors").write_bytes(b"of the steps that are done again")
    fit(run, snapshots=(3, 6, 9), resume=tmp_path / "step=4.ckpt")
    assert steps(run) == [3, 6, 9]
    assert (run / "tasks/a/snapshots/3/deltas.safetensors").stat().st_mtime_ns == before
    assert list(RunFolder(run).snapshots("a")) == [3, 6, 9], "all of them can be read, and are of this finetune"
    fit(run, max_epochs=1)
    assert steps(run) == []


def merge_trainer(run: Path, logs: Path | None = None, **drm: object) -> MergeTrainer:
    return MergeTrainer(
        max_steps=8, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, logger=CSVLogger(logs, name="run", version="") if logs is not None else False,
        callbacks=[DRMMergeCallback(TASKS, DRM(density=0.5), run, **drm)],
    )  # fmt: skip


def two_tasks(kind: type[Vectors] = Validated) -> MultiTaskDataModule:
    return MultiTaskDataModule({"a": kind(1), "b": kind(2)})


def test_merged_snapshots_are_logged_at_their_step(tmp_path: Path):
    trainer = merge_trainer(tmp_path / "run", tmp_path / "logs", snapshots=[2, 5], merge_at_snapshots=True)
    trainer.fit(VectorTask(), datamodule=two_tasks(), base_batches=0)
    rows = [row for row in csv.DictReader((tmp_path / "logs/run/metrics.csv").open()) if row["merge/snapshot/average"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row, step in zip(rows, (2, 5), strict=True):
        expected = merged_accuracies(tmp_path / "run", step)
        found = {task: float(row[f"merge/snapshot/{task}"]) for task in TASKS}
        assert found == pytest.approx(expected)
        assert float(row["merge/snapshot/average"]) == pytest.approx(sum(expected.values()) / 2)


def merged_accuracies(run: Path, step: int) -> dict[str, float]:
    """By hand: base plus merged deltas, in float64."""
    vectors = {task: load_file(run / f"tasks/{task}/snapshots/{step}/deltas.safetensors") for task in TASKS}
    found = {}
    for index, task in enumerate(TASKS, 1):
        module = VectorTask().double()
        state = module.state_dict()
        for name in vectors["a"]:
            deltas = [vectors[other][name].double() for other in TASKS]
            matrix = deltas[0].ndim == 2
            state[name] += DRM(density=0.5).merge(deltas) if matrix else (deltas[0] + deltas[1]) / 2
        state |= load_file(run / f"tasks/{task}/snapshots/{step}/head.safetensors")
        module.load_state_dict(state)
        x, y = Vectors(index).test.tensors
        found[task] = float((module(x.double()).argmax(1) == y).double().mean())
    return found


def test_snapshots_do_not_make_a_finished_task_another_one(tmp_path: Path):
    merge_trainer(tmp_path).fit(VectorTask(), datamodule=two_tasks(), base_batches=0)
    written = [(tmp_path / f"tasks/{task}/deltas.safetensors").stat().st_mtime_ns for task in TASKS]
    merge_trainer(tmp_path, snapshots=[3]).fit(VectorTask(), datamodule=two_tasks(), base_batches=0)
    assert [(tmp_path / f"tasks/{task}/deltas.safetensors").stat().st_mtime_ns for task in TASKS] == written
    assert steps(tmp_path) == []
    merge_trainer(tmp_path, snapshots=[3]).fit(VectorTask(), datamodule=two_tasks(), base_batches=0, retrain=True)
    assert steps(tmp_path) == steps(tmp_path, "b") == [3]
    assert json.loads((tmp_path / "report.json").read_text())["tasks"] == TASKS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": [0]}, "snapshots must be numbers of optimizer steps, 1 or more, got 0"),
        ({"snapshot_every_n_epochs": 0}, "snapshot_every_n_epochs must be 1 or more, got 0"),
        ({"merge_at_snapshots": True}, "merge_at_snapshots needs snapshots, at steps or every few epochs, got none"),
        ({"snapshots": [2], "dirpath": None}, "give DRMMergeCallback a dirpath"),
        ({"snapshots": [2], "weights": "averaged"}, "do not lead to weights 'averaged'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        DRMMergeCallback(TASKS, **{"dirpath": tmp_path, **settings})


def test_fits_that_cannot_have_them_are_refused_before_they_begin(tmp_path: Path):
    with pytest.raises(ValueError, match="taken at step 9, but the fit of task 'a' ends after 8 steps"):
        fit(tmp_path / "run", snapshots=(3, 9), max_steps=8)
    merge = DRMMergeCallback(["a"], dirpath=tmp_path, snapshots=[1], merge_at_snapshots=True)
    with pytest.raises(ValueError, match="validation sets of all tasks, which MergeTrainer alone knows"):
        quiet_trainer(callbacks=[merge.for_task("a")]).fit(VectorTask(), Vectors(1))
    merging = {"snapshots": [1], "merge_at_snapshots": True}
    with pytest.raises(ValueError, match="merge_at_snapshots cannot be used here: it needs a logger, got none"):
        merge_trainer(tmp_path, **merging).fit(VectorTask(), datamodule=two_tasks())
    with pytest.raises(ValueError, match="a, b: the data have no val_dataloader"):
        merge_trainer(tmp_path, tmp_path / "logs", **merging).fit(VectorTask(), datamodule=two_tasks(Vectors))
    assert not (tmp_path / "tasks").exists()


def test_fsdp1_is_refused(tmp_path: Path):
    merge = DRMMergeCallback(["a"], dirpath=tmp_path)
    taking = TakeSnapshots(merge.session, "a", SnapshotPlan([2]))
    with pytest.raises(ValueError, match="FSDPOnCPU puts the weights together only when training ends"):
        taking.setup(quiet_trainer(strategy=FSDPOnCPU()), VectorTask(), "fit")


def test_steps_that_a_fit_did_not_reach_are_named(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"'a' has no snapshot of step 50, 99: .* its fit ended after 12 steps"):
        fit(tmp_path, snapshots=(5, 50, 99))


def test_averages_beside_the_last_weights_do_not_get_into_snapshots(tmp_path: Path):
    fit(tmp_path / "run", snapshots=(6,), callbacks=[EMAWeightAveraging(decay=0.5)])
    fit(tmp_path / "short", max_steps=6)
    assert same(tmp_path / "run/tasks/a/snapshots/6", tmp_path / "short/tasks/a")
