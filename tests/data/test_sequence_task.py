"""Inputs and targets as tokens, against the tokenizer's own calls."""

from pathlib import Path

import pytest
import torch

from helpers.tiny_language import COLORS, save_answers, save_tiny_t5
from lightning_drm.data import SequenceTask


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    return save_answers(tmp_path / "answers.csv", COLORS, 1)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("cache", [True, False])
def test_batches_hold_inputs_and_targets(file: str, t5: str, cache: bool):
    task = SequenceTask(file, t5, prefix="old ", cache=cache, batch_size=8)
    task.prepare_data()
    task.setup("fit")
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 96, "validation": 12, "test": 12}
    seen = 0
    for batch in task.test_dataloader():
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
            row = task.rows["test"][seen]
            expected = task.tokenizer(f"old {row['text']}")["input_ids"]
            assert ids[: len(expected)].tolist() == expected
            assert ids[len(expected) :].tolist() == [0] * (len(ids) - len(expected))
            assert mask.tolist() == [1] * len(expected) + [0] * (len(ids) - len(expected))
            target = task.tokenizer(row["labels"])["input_ids"]
            assert target[-1] == task.tokenizer.eos_token_id
            assert labels.tolist() == target + [-100] * (len(labels) - len(target))
            seen += 1
    assert seen == 12


def test_limits_of_length(file: str, t5: str):
    task = SequenceTask(file, t5, max_length=3, max_target_length=2)
    for batch in task.train_dataloader():
        assert batch["input_ids"].shape[1] <= 3
        assert batch["labels"].shape[1] == 2
    whole = SequenceTask(file, t5)
    assert max(batch["labels"].shape[1] for batch in whole.train_dataloader()) == 3


def test_the_second_time_nothing_is_encoded(file: str, t5: str):
    first, second = (SequenceTask(file, t5, prefix="old ") for _ in range(2))
    assert first.splits["train"].cache_files == second.splits["train"].cache_files
    assert SequenceTask(file, t5, prefix="new ").splits["train"].cache_files != first.splits["train"].cache_files


def test_setting_up_gives_the_kind_what_it_decodes_with(file: str, t5: str):
    task = SequenceTask(file, t5, max_new_tokens=7, num_beams=2)
    task.setup("test")
    assert task.kind.tokenizer is task.tokenizer
    assert (task.kind.max_new_tokens, task.kind.num_beams) == (7, 2)
    assert task.num_classes == 0
    again = SequenceTask(**task.hparams)
    assert again.kind.max_new_tokens == 7
    assert again.rows["test"]["labels"][:] == task.rows["test"]["labels"][:]


def test_worker_processes_give_the_same_batches(file: str, t5: str):
    alone, helped = (SequenceTask(file, t5, num_workers=num).train_dataloader() for num in (0, 2))
    assert [batch["labels"].tolist() for batch in alone] == [batch["labels"].tolist() for batch in helped]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_column": "question"}, "Expected a column 'question' in .*, but its split 'train' has text, target"),
        ({"target_column": "answer"}, "Expected a column 'answer'"),
        ({"target_column": "text"}, "Expected different columns for inputs and targets, got 'text' for both"),
        ({"num_beams": 0}, "Expected at least 1, got num_beams 0"),
    ],
)
def test_what_does_not_fit_is_named(file: str, t5: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SequenceTask(file, t5, **options).setup("fit")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,1", "b,2"], "Expected texts in column 'target' of the split 'train', got Value"),
        (["a,one", "b,"], "Expected a text in every row, but 20 of 40 rows of the split 'train' have none in column"),
        (["a,one", ",two"], r"Expected a text in every row, but 20 of 40 rows of '.*rows\.csv' have none in column"),
    ],
)
def test_values_that_do_not_fit_are_counted(tmp_path: Path, t5: str, rows: list[str], message: str):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,target", *rows * 20, ""]))
    with pytest.raises(ValueError, match=message):
        SequenceTask(str(path), t5).setup("fit")
