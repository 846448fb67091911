"""A task is collected when something was trained, and done when its deltas are whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.training.run_folder import RunFolder


class NothingToTrain(Vectors):
    """No training samples at all."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0, dtype=torch.long)), batch_size=16)


def merge_trainer(run: Path, **arguments: object) -> MergeTrainer:
    plain = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return MergeTrainer(**{**plain, **quiet, **arguments}, callbacks=[DRMMergeCallback(["a", "b"], dirpath=run)])


def test_a_fit_of_an_empty_training_set_is_refused_and_leaves_nothing(tmp_path: Path):
    data = MultiTaskDataModule({"a": NothingToTrain(1), "b": Vectors(2)})
    with pytest.raises(ValueError, match="Task 'a' was not trained: its fit took no optimizer step"):
        merge_trainer(tmp_path).fit(VectorTask(), datamodule=data, base_batches=0)
    assert not RunFolder(tmp_path).has_task_vector("a")
    data = MultiTaskDataModule({"a": Vectors(1), "b": Vectors(2)})
    # Other data under the same settings' names: the earlier fit has left nothing that stands in its way.
    merge_trainer(tmp_path).fit(VectorTask(), datamodule=data, base_batches=0, retrain=True)
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    "limits", [{"max_steps": 0}, {"limit_train_batches": 0}, {"max_epochs": 0}], ids=lambda limits: next(iter(limits))
)
def test_limits_that_leave_no_step_are_refused(tmp_path: Path, limits: dict[str, int]):
    merge = DRMMergeCallback(["a", "b"], dirpath=tmp_path)
    with pytest.raises(ValueError, match="Task 'a' was not trained: its fit took no optimizer step"):
        quiet_trainer(callbacks=[merge.for_task("a")], **limits).fit(VectorTask(), datamodule=Vectors(1))
    assert merge.missing == ["a", "b"]


def test_a_second_fit_on_the_same_trainer_is_refused():
    merge = DRMMergeCallback(["a", "b"])
    trainer = quiet_trainer(callbacks=[merge.for_task("a")])
    trainer.fit(VectorTask(), datamodule=Vectors(1))
    merge.for_task("b")
    with pytest.raises(ValueError, match=r"already fitted 8 steps.* task 'b' .*make a new Trainer for each task"):
        trainer.fit(VectorTask(), datamodule=Vectors(2))
    assert merge.missing == ["b"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] ^= 0xFF  # in the length of the header
    path.write_bytes(bytes(content))


@pytest.mark.attacks
@pytest.mark.parametrize("name", ["deltas.safetensors", "head.safetensors", "metrics.json"])
@pytest.mark.parametrize("damage", [cut, emptied, flipped, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_task_with_damaged_files_is_not_done(tmp_path: Path, name: str, damage: Callable[[Path], None]):
    data, module = MultiTaskDataModule({"a": Vectors(1), "b": Vectors(2)}), VectorTask()
    merge_trainer(tmp_path).fit(module, datamodule=data)
    report = (tmp_path / "report.json").read_text()
    folder = RunFolder(tmp_path)
    assert folder.missing(["a", "b"]) == []
    damage(folder.task("a") / name)
    assert folder.missing(["a", "b"]) == ["a"]
    before = (folder.task("b") / "deltas.safetensors").stat().st_mtime_ns
    merge_trainer(tmp_path).fit(module, datamodule=data)
    assert folder.missing(["a", "b"]) == []
    assert (folder.task("b") / "deltas.safetensors").stat().st_mtime_ns == before, "only what is damaged is done again"
    assert (tmp_path / "report.json").read_text() == report
