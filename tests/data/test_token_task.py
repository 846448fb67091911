"""Tagged words as batches, against an alignment by the tokenizer's character offsets."""

from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

from helpers.kinds import TAGS, save_rows, tagged_sentences
from helpers.tiny import save_tiny_bert
from lightning_drm.data import TokenTask
from lightning_drm.kinds import IGNORE_INDEX, MultiLabel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that makes several tokens of words that it does not know, such as red-cat."""
    return save_tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows() -> list[dict]:
    rows = tagged_sentences(seed=0, count=60)
    for row in rows[::2]:
        row["tokens"][0] = "red-cat"
    return rows


def aligned(tokenizer: object, row: dict, max_length: int | None = None) -> list[int]:
    """The tag of each token where a word begins, found by offsets in the text that the words make."""
    text, starts = "", {}
    for word, tag in zip(row["tokens"], row["tags"], strict=True):
        starts[len(text)] = TAGS.index(tag)
        text += f"{word} "
    spans = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_length)["offset_mapping"]
    return [starts.get(start, IGNORE_INDEX) if end > start else IGNORE_INDEX for start, end in spans]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("max_length", [None, 6])
def test_the_first_token_of_each_word_has_its_tag(base, rows, tmp_path, cache, max_length):
    file = save_rows(tmp_path / "rows.jsonl", rows)
    task = TokenTask(file, base, cache=cache, max_length=max_length, eval_batch_size=4)
    task.prepare_data()
    task.setup("fit")
    assert task.class_names == TAGS
    tokenizer = AutoTokenizer.from_pretrained(base)
    held = [{**row, "tags": [TAGS[tag] for tag in row["labels"]]} for row in task.rows["test"]]
    assert any("red-cat" in row["tokens"] for row in held), "the case shows nothing"
    expected = [aligned(tokenizer, row, max_length) for row in held]
    seen = []
    for batch in task.test_dataloader():
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        assert batch["labels"].shape == batch["input_ids"].shape
        assert batch["labels"].dtype == torch.int64
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
        seen += [
            labels[mask == 1].tolist() for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True)
        ]
    assert seen == expected
    if max_length is not None:
        kept = sum(tag != IGNORE_INDEX for row in seen for tag in row)
        assert kept < sum(len(row["tags"]) for row in held), "tags of words that were cut off are gone"


def test_byte_level_tokenizers_take_words_too(tmp_path):
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *letters, "Ġr", "ed"])}
    GPT2Tokenizer(vocab=vocabulary, merges=[("Ġ", "r"), ("e", "d")], pad_token="<|endoftext|>").save_pretrained(
        tmp_path / "base"
    )
    file = save_rows(tmp_path / "rows.jsonl", [{"tokens": ["red", "a"], "tags": ["x", "y"]}] * 20)
    task = TokenTask(file, str(tmp_path / "base"))
    batch = next(iter(task.test_dataloader()))
    assert task.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == ["Ġr", "ed", "Ġ", "a"]
    assert batch["labels"][0].tolist() == [0, IGNORE_INDEX, 1, IGNORE_INDEX]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": ["O"]}, r"got 2 words in 'tokens' and 1 tags in 'tags', in row 7 of the split 'train' of '"),
        ({"tokens": ["red", ""]}, r"Expected words in every row, got \['red', ''\] in row 7 of the split 'train'"),
        ({"tokens": ["red", None]}, r"Expected words in every row, got \['red', None\] in row 7"),
        ({"tokens": [], "tags": []}, r"Expected words in every row, got \[\] in row 7"),
        ({"tokens": None}, "Expected words in every row, got None in row 7"),
        ({"tags": None}, "Expected a tag for every word, got None in row 7 of the split 'train', column 'tags'"),
    ],
)
def test_rows_that_do_not_fit_are_named(base, tmp_path, change, message):
    rows = [{"tokens": ["red", "one"], "tags": ["I-color", "O"]} for _ in range(20)]
    rows[7] |= change
    with pytest.raises(ValueError, match=message):
        TokenTask(save_rows(tmp_path / "rows.jsonl", rows), base).setup("fit")


def test_texts_instead_of_words_are_refused(base, tmp_path):
    file = save_rows(tmp_path / "rows.jsonl", [{"tokens": "red one", "tags": ["a", "b"]}] * 20)
    with pytest.raises(ValueError, match="Expected a list of words in every row of column 'tokens', got Value"):
        TokenTask(file, base).setup("fit")


def test_other_kinds_are_refused(base):
    with pytest.raises(ValueError, match="TokenTask is for tasks of the kind Tokens, got MultiLabel"):
        TokenTask("rows.jsonl", base, kind=MultiLabel())


def test_a_tag_that_only_the_test_set_has_is_named(base, tmp_path):
    train = save_rows(tmp_path / "train.jsonl", tagged_sentences(0, 40))
    test = save_rows(tmp_path / "test.jsonl", [{"tokens": ["red"], "tags": ["B-hue"]}])
    task = TokenTask("json", base, data_files={"train": train, "test": test})
    with pytest.raises(ValueError, match="in the split 'test' of 'json', found 'B-hue' too"):
        task.setup("fit")


def test_groups_stay_on_one_side(base, tmp_path):
    rows = [{**row, "author": number // 4} for number, row in enumerate(tagged_sentences(0, 120))]
    task = TokenTask(save_rows(tmp_path / "rows.jsonl", rows), base, group_column="author")
    authors = [set(table["author"]) for table in task.rows.values()]
    assert sum(map(len, authors)) == len(set.union(*authors)) == 30


def test_the_second_time_nothing_is_encoded(base, rows, tmp_path):
    file = save_rows(tmp_path / "rows.jsonl", rows)
    first, second = (TokenTask(file, base).splits["test"] for _ in range(2))
    assert isinstance(first, datasets.Dataset)
    assert first.cache_files == second.cache_files


def test_files_stay_as_they_are(base, rows, tmp_path):
    file = Path(save_rows(tmp_path / "rows.jsonl", rows))
    before = file.read_bytes()
    TokenTask(str(file), base).setup("fit")
    assert file.read_bytes() == before
