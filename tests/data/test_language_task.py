"""Texts and prompts as tokens, against the tokenizer's own calls."""

from pathlib import Path

import pytest

from helpers.tiny_language import NUMBERS, save_counting, save_tiny_llama, tokenizer
from lightning_drm.data import LanguageTask


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), pads=False)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return save_counting(tmp_path / "counting.csv", NUMBERS, 1)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("prompt", ["prompt", None])
def test_batches_hold_texts_behind_prompts(file: str, llama: str, prompt: str | None, append_eos: bool, cache: bool):
    task = LanguageTask(file, llama, prompt_column=prompt, append_eos=append_eos, cache=cache, batch_size=5)
    task.prepare_data()
    task.setup("fit")
    begin, end = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    words = task.tokenizer.get_vocab()
    seen = 0
    for batch in task.test_dataloader():
        for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
            row = task.rows["test"][seen]
            context = [begin, *(words[word] for word in (row[prompt] if prompt else "").split())]
            text = [*(words[word] for word in row["labels"].split()), *([end] if append_eos else [])]
            padding = len(ids) - len(context) - len(text)
            assert ids.tolist() == context + text + [0] * padding
            assert mask.tolist() == [1] * len(context + text) + [0] * padding
            assert labels.tolist() == [-100] * len(context) + text + [-100] * padding
            seen += 1
    assert seen == len(task.rows["test"]) == 12


def test_texts_are_cut_at_max_length(file: str, llama: str):
    cut, whole = (LanguageTask(file, llama, max_length=length, batch_size=4) for length in (5, None))
    assert max(batch["input_ids"].shape[1] for batch in whole.test_dataloader()) > 5
    for sample, full in zip(cut.splits["test"], whole.splits["test"], strict=True):
        for key in ("input_ids", "labels", "attention_mask"):
            assert sample[key].tolist() == full[key][:5].tolist()


def test_a_tokenizer_that_ends_each_text_does_not_end_prompts(file: str, llama: str, tmp_path: Path):
    tokenizer(begins=True, ends=True).save_pretrained(tmp_path / "ends")
    ours, theirs = (LanguageTask(file, base, prompt_column="prompt") for base in (str(tmp_path / "ends"), llama))
    for sample, expected in zip(ours.splits["test"], theirs.splits["test"], strict=True):
        assert sample["input_ids"].tolist() == expected["input_ids"].tolist()
        assert sample["labels"].tolist() == expected["labels"].tolist()


def test_hyper_parameters_make_the_same_task_again(file: str, llama: str):
    task = LanguageTask(file, llama, prompt_column="prompt", max_length=9)
    again = LanguageTask(**task.hparams)
    assert [sample["labels"].tolist() for sample in again.splits["test"]] == [
        sample["labels"].tolist() for sample in task.splits["test"]
    ]
    assert again.splits["train"].cache_files == task.splits["train"].cache_files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "story"}, "Expected a column 'story' in .*, but its split 'train' has prompt, text"),
        ({"prompt_column": "question"}, "Expected a column 'question'"),
        ({"prompt_column": "text"}, "Expected different columns for prompts and texts, got 'text' for both"),
        ({"prompt_column": "prompt", "max_length": 2}, "Expected a token to predict in every row, but the text '.*'"),
        ({"max_length": 1}, "none among the first 1 tokens"),
    ],
)
def test_what_does_not_fit_is_named(file: str, llama: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LanguageTask(file, llama, **options).setup("fit")


def test_an_end_token_must_be_there_to_be_appended(file: str, tmp_path: Path):
    made = tokenizer(begins=True, ends=False)
    made.eos_token = None
    made.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"Expected a tokenizer with an end token for append_eos, .* set append_eos"):
        LanguageTask(file, str(tmp_path / "endless")).setup("fit")
    LanguageTask(file, str(tmp_path / "endless"), append_eos=False).setup("fit")


def test_texts_without_a_token_to_predict_are_refused(llama: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two"}\n{"text": ""}\n' * 20)
    with pytest.raises(ValueError, match="Expected a token to predict in every row, but the text '' has none"):
        LanguageTask(str(path), llama, append_eos=False).setup("fit")
    LanguageTask(str(path), llama).setup("fit")  # there is the end to predict
