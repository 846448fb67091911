"""Questions with their choices as batches, against the tokenizer's own fields of each pair."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from helpers.kinds import questions, save_rows
from helpers.tiny import save_tiny_bert
from lightning_drm.data import MultipleChoiceTask
from lightning_drm.kinds import Regression


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("cache", [True, False])
def test_every_pair_is_encoded_and_padded_together(base, tmp_path, cache):
    rows = questions(seed=0, count=40)
    for row in rows[::2]:
        row["choices"][1] += " one two three"
    task = MultipleChoiceTask(
        save_rows(tmp_path / "rows.jsonl", rows), base, label_column="answer", cache=cache, eval_batch_size=3
    )
    task.prepare_data()
    task.setup("fit")
    tokenizer, held, seen = AutoTokenizer.from_pretrained(base), task.rows["test"], []
    for batch in task.test_dataloader():
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        size, num_choices, num_tokens = batch["input_ids"].shape
        assert num_choices == 3
        assert num_tokens == int(batch["attention_mask"].sum(-1).max()), "padded to the longest"
        for number in range(size):
            row = held[len(seen)]
            assert int(batch["labels"][number]) == row["labels"]
            for place, choice in enumerate(row["choices"]):
                pair = tokenizer(row["question"], choice)
                real = batch["attention_mask"][number, place] == 1
                for name, values in pair.items():
                    assert batch[name][number, place][real].tolist() == values
            seen.append(row)
    assert len(seen) == len(held) == 4


def encoded(task: MultipleChoiceTask) -> list[dict[str, torch.Tensor]]:
    return list(task.test_dataloader())


def test_choices_in_columns_of_their_own_are_the_same(base, tmp_path):
    rows = questions(seed=1, count=40)
    apart = [
        {"question": row["question"], **dict(zip("xyz", row["choices"], strict=True)), "answer": "ABC"[row["answer"]]}
        for row in rows
    ]
    lists = MultipleChoiceTask(save_rows(tmp_path / "lists.jsonl", rows), base, label_column="answer")
    columns = MultipleChoiceTask(
        save_rows(tmp_path / "columns.jsonl", apart), base, choice_columns=["x", "y", "z"], label_column="answer"
    )
    for ours, theirs in zip(encoded(columns), encoded(lists), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_question_column_begins_each_choice(base, tmp_path):
    rows = [{**row, "begins": "two cat"} for row in questions(seed=1, count=40)]
    whole = [{**row, "choices": [f"two cat {choice}" for choice in row["choices"]]} for row in rows]
    begun = MultipleChoiceTask(
        save_rows(tmp_path / "a.jsonl", rows), base, ["question", "begins"], label_column="answer"
    )
    same = MultipleChoiceTask(save_rows(tmp_path / "b.jsonl", whole), base, label_column="answer")
    for ours, theirs in zip(encoded(begun), encoded(same), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_texts_are_cut_to_the_maximal_length(base, tmp_path):
    file = save_rows(tmp_path / "rows.jsonl", questions(seed=1, count=40))
    task = MultipleChoiceTask(file, base, label_column="answer", max_length=5)
    assert all(batch["input_ids"].shape[-1] == 5 for batch in encoded(task))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"choices": ["red"]}, {}, "same number of choices in every row, .* 1 in row 3 of 'train'; 3 in row 0"),
        ({"choices": ["red", None, "cat"]}, {}, r"Expected texts as choices, got \['red', None, 'cat'\] in row 3 of"),
        ({"question": None}, {}, "Expected a text in every row, but 1 of 40 rows of .* have none in column 'question'"),
        ({"answer": 3}, {}, r"Expected the right choice's number \(0 to 2\), .* got 3 in row 3 of 'train'"),
        ({}, {"choice_columns": "question"}, "Expected a list of texts in every row of column 'question'"),
        ({}, {"choice_columns": ["choices", "question"]}, "Expected texts in column 'choices' of "),
        (
            {},
            {"choice_columns": ["a", "b"]},
            "Expected a column 'a' in .*, but its split 'train' has question, choices",
        ),
        ({}, {"question_columns": ["a", "b", "c"]}, "Expected one column or two in question_columns"),
        ({}, {"choice_columns": []}, "Expected one column or more in choice_columns, got none"),
        ({}, {"kind": Regression()}, "is for tasks of the kind Choice, got Regression"),
    ],
    ids=lambda value: json.dumps(value, default=lambda value: type(value).__name__) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(base, tmp_path, change, options, message):
    rows = questions(seed=0, count=40)
    rows[3] |= change
    file = save_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        MultipleChoiceTask(file, base, label_column="answer", **options).setup("fit")
