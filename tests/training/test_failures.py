"""A task that fails: it is named with the reason, the others are finetuned, and nothing is merged."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import Vectors, VectorTask, save_run_config
from lightning_drm import DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.cli.main import main
from lightning_drm.training.run_folder import RunFolder


class Fails(Vectors):
    """Data that raise an error where training asks for them."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error

    def train_dataloader(self) -> DataLoader:
        raise self.error


class Empty(Vectors):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0, dtype=torch.long)), batch_size=16)


class NotFinite(Vectors):
    """Vectors that make the loss, and so the weights, not a number."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.full((32, 6), torch.nan), torch.zeros(32, dtype=torch.long)), 16)


class UnseenLabel(Vectors):
    """A label that the head has no output for."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(32, 6), torch.full((32,), 7)), batch_size=16)


def fit(run: Path, first: Vectors, **options: object) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [DRMMergeCallback(["a", "b"], dirpath=run)]
    trainer = MergeTrainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet)
    data = MultiTaskDataModule({"a": first, "b": Vectors(2)})
    trainer.fit(VectorTask(), datamodule=data, **options)


MISTAKES: dict[str, tuple[Callable[[], Vectors], str]] = {
    "a value": (lambda: Fails(ValueError("Column 'x' is missing.")), "Column 'x' is missing."),
    "a file": (lambda: Fails(FileNotFoundError(2, "No such file", "photos/1.png")), r"No such file: 'photos/1.png'"),
    "nothing to train": (lambda: Empty(1), "its fit took no optimizer step"),
    "not finite": (lambda: NotFinite(1), "finite|NaN|nan"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_the_other_tasks_are_finetuned(tmp_path: Path, case: str):
    data, reason = MISTAKES[case]
    with pytest.raises(ValueError, match=rf"Not finetuned, so nothing is merged:\n  task 'a': .*({reason})") as failed:
        fit(tmp_path, data())
    assert "Finetuned: b. Once this is mended, the same command" in str(failed.value)
    assert RunFolder(tmp_path).missing(["a", "b"]) == ["a"]
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "report.json").exists()


def test_the_first_failure_ends_the_run_if_that_is_asked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^Task 'a': Column 'x' is missing\.$"):
        fit(tmp_path, MISTAKES["a value"][0](), keep_going=False)
    assert RunFolder(tmp_path).missing(["a", "b"]) == ["a", "b"]
    with pytest.raises(KeyError, match="a bug"):
        fit(tmp_path / "another", Fails(KeyError("a bug")), keep_going=False)


@pytest.mark.parametrize(
    "data", [lambda: Fails(KeyError("a bug")), lambda: UnseenLabel(1)], ids=["bug", "unseen label"]
)
def test_a_bug_keeps_its_traceback(tmp_path: Path, data: Callable[[], Vectors]):
    with pytest.raises(ExceptionGroup, match=r"task 'a': (KeyError: 'a bug'|IndexError: Target 7)") as failed:
        fit(tmp_path, data())
    (bug,) = failed.value.exceptions
    assert isinstance(bug, KeyError | IndexError)
    assert bug.__traceback__ is not None
    assert RunFolder(tmp_path).missing(["a", "b"]) == ["a"], "the other task is finetuned all the same"


def test_several_tasks_that_fail_are_all_named(tmp_path: Path):
    trainer = MergeTrainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        callbacks=[DRMMergeCallback(["a", "b", "c"], dirpath=tmp_path)],
    )  # fmt: skip
    tasks = {"a": Fails(ValueError("One.")), "b": Vectors(2), "c": Fails(ValueError("Two."))}
    with pytest.raises(ValueError, match=r"task 'a': One\.\n  task 'c': Two\.\nFinetuned: b\."):
        trainer.fit(VectorTask(), datamodule=MultiTaskDataModule(tasks))


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A fit of the tasks color and pet; color's data are to be spoiled."""
    config = save_run_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= {"max_steps": 4, "enable_progress_bar": False, "logger": False}
    config.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(config)]


def rows(*lines: str) -> bytes:
    return "\n".join(["text,label", *lines, ""]).encode()


SPOILED = {
    "no rows": (rows(), r"Expected rows in .*color\.csv, .* corresponds to no data"),
    "one class": (rows(*["a red one,red"] * 40), "Expected two classes or more in the training split .* only 'red'"),
    "not a table": (
        b'text,label\n"a red one,red\n\xff\xfe\x00,,,,\n',
        r"Expected rows in .*color\.csv, which cannot be read: \S",
    ),
    "no such column": (b"words,kind\na red one,red\n", "Expected a column 'text'"),
    "a missing label": (rows(*["a red one,red", "a blue one,blue"] * 20, "a two,"), "none in column 'label'"),
    "an empty file": (b"", r"Expected rows in .*color\.csv, which cannot be read: \S"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_data_are_one_sentence(words: list[str], tmp_path: Path, case: str, capsys: pytest.CaptureFixture):
    content, reason = SPOILED[case]
    (tmp_path / "color.csv").write_bytes(content)
    assert_named(words, tmp_path, reason, capsys)


def test_a_label_that_was_not_trained(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "test.csv").write_bytes(rows("a red one,red", "a violet one,violet"))
    (tmp_path / "color.csv").rename(tmp_path / "train.csv")
    spoil(tmp_path, dataset="csv", data_files={s: str(tmp_path / f"{s}.csv") for s in ("train", "test")})
    assert_named(words, tmp_path, r"labels of the training split in the split 'test' .* found 'violet' too", capsys)


def test_an_image_that_cannot_be_decoded(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    draw = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        for index in range(20):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    broken = tmp_path / "photos" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    spoil(tmp_path, "lightning_drm.data.ImageTask", dataset=str(tmp_path / "photos"))
    assert_named(words, tmp_path, r"cannot identify image file .*photos/dog/3\.png", capsys)


def spoil(folder: Path, class_path: str = "lightning_drm.data.TextTask", **arguments: object) -> None:
    """Gives the task color another data module."""
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    given = {"pretrained": str(folder / "base"), "batch_size": 16, **arguments}
    content["data"]["tasks"]["color"] = {"class_path": class_path, "init_args": given}
    path.write_text(yaml.safe_dump(content))


def assert_named(words: list[str], folder: Path, reason: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err.split("lightning-drm: ")[-1].splitlines()
    assert said[0] == "Not finetuned, so nothing is merged:"
    assert said[1].startswith("  task 'color': ")
    assert len(said) == 3, said
    assert re.search(reason, said[1]), said[1]
    assert RunFolder(folder / "run").missing(["color", "pet"]) == ["color"]
    assert not (folder / "run" / "merged").exists()
