import json
from pathlib import Path

import datasets
import pytest
import torch

from helpers.sample_rows import BASE, make_rows
from helpers.tiny_language import save_tiny_llama
from lightning_drm import TransformerTask
from lightning_drm.data import TextTask

WRITERS = {"csv": "to_csv", "json": "to_json", "jsonl": "to_json", "parquet": "to_parquet"}


def write(file: Path, **columns: list) -> str:
    getattr(datasets.Dataset.from_dict(columns), WRITERS[file.suffix[1:]])(file)
    return str(file)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_batches(tmp_path, reviews, suffix):
    task = TextTask(write(tmp_path / f"reviews_.{suffix}", **make_rows(100)), BASE)
    task.prepare_data()
    task.setup("fit")
    assert task.class_names == ["bad", "good", "so so"]
    assert task.num_classes == 3
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 80, "validation": 10, "test": 10}
    for batch, expected in zip(task.test_dataloader(), TextTask(str(reviews), BASE).test_dataloader(), strict=True):
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_a_json_array_is_read_too(tmp_path):
    rows = make_rows(40)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]))
    assert len(TextTask(str(file), BASE).rows["train"]) == 32


def test_a_folder_with_a_file_per_split(tmp_path):
    rows = make_rows(60)
    write(tmp_path / "train.csv", **{name: column[:40] for name, column in rows.items()})
    write(tmp_path / "test.csv", **{name: column[40:] for name, column in rows.items()})
    task = TextTask(str(tmp_path), BASE)
    assert task.rows["test"]["text"][:] == rows["text"][40:]
    assert (len(task.rows["train"]), len(task.rows["validation"])) == (36, 4)


def test_files_by_split_and_splits_by_name(tmp_path):
    files = {name: write(tmp_path / f"{name}.csv", **make_rows(num)) for name, num in {"mine": 40, "final": 20}.items()}
    task = TextTask("csv", BASE, data_files=files, train_split="mine", test_split="final")
    assert {name: len(split) for name, split in task.rows.items()} == {"train": 36, "validation": 4, "test": 20}


def test_an_original_validation_set_can_serve_as_test_set(tmp_path):
    files = {name: write(tmp_path / f"{name}.csv", **make_rows(40)) for name in ("train", "validation")}
    task = TextTask("csv", BASE, data_files=files, validation_split=None, test_split="validation")
    assert {name: len(split) for name, split in task.rows.items()} == {"train": 36, "validation": 4, "test": 40}


def test_batches_are_padded_to_their_longest_text_and_cut_at_max_length(reviews):
    widths = {batch["input_ids"].shape[1] for batch in TextTask(str(reviews), BASE, batch_size=2).train_dataloader()}
    assert len(widths) > 3
    for batch in TextTask(str(reviews), BASE, batch_size=2, max_length=8).train_dataloader():
        assert batch["input_ids"].shape[1] <= 8
        assert batch["labels"].dtype == torch.int64


def test_a_pair_of_texts_becomes_one_input(tmp_path):
    rows = make_rows(40)
    file = write(tmp_path / "pairs.csv", question=rows["text"], answer=rows["author"], label=rows["label"])
    task = TextTask(file, BASE, text_columns=["question", "answer"])
    sample, row = task.splits["train"][0], task.rows["train"][0]
    assert list(sample["input_ids"]) == task.tokenizer(row["question"], row["answer"])["input_ids"]
    assert set(sample["token_type_ids"]) == {0, 1}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([9, 10, 100], ["9", "10", "100"]),
        ([True, False], ["false", "true"]),
        (["b", "a"], ["a", "b"]),
    ],
)
def test_labels_are_numbered_in_the_order_of_their_values(tmp_path, values, names):
    labels = [values[row % len(values)] for row in range(60)]
    texts = [str(label) for label in labels]
    task = TextTask(write(tmp_path / "rows.parquet", text=[f"it is {text}" for text in texts], label=labels), BASE)
    assert task.class_names == names
    for row in task.rows["train"]:
        assert row["text"].lower() == f"it is {names[row['labels']]}"


def test_a_class_label_keeps_its_order(tmp_path):
    label = datasets.ClassLabel(names=["z", "a"])
    table = datasets.Dataset.from_dict({"text": ["x"] * 40, "label": [0, 1] * 20})
    table.cast_column("label", label).to_parquet(tmp_path / "rows.parquet")
    assert TextTask(str(tmp_path / "rows.parquet"), BASE).class_names == ["z", "a"]


def test_the_second_time_nothing_is_encoded(reviews):
    first, second = (TextTask(str(reviews), BASE, max_length=16) for _ in range(2))
    first.prepare_data()
    [file] = [Path(entry["filename"]) for entry in first.splits["train"].cache_files]
    written = file.stat().st_mtime_ns
    second.setup("fit")
    assert second.splits["train"].cache_files == first.splits["train"].cache_files
    assert file.stat().st_mtime_ns == written
    other = TextTask(str(reviews), BASE, max_length=12)
    assert other.splits["train"].cache_files != first.splits["train"].cache_files


def test_without_the_cache_batches_are_the_same(reviews):
    cached, fresh = (TextTask(str(reviews), BASE, cache=cache).train_dataloader() for cache in (True, False))
    for expected, batch in zip(cached, fresh, strict=True):
        assert all(torch.equal(expected[key], batch[key]) for key in expected)


def test_worker_processes_give_the_same_batches(reviews):
    alone, helped = (TextTask(str(reviews), BASE, num_workers=num).train_dataloader() for num in (0, 2))
    assert [batch["input_ids"].tolist() for batch in alone] == [batch["input_ids"].tolist() for batch in helped]


def test_training_order_depends_on_the_seed_alone(reviews):
    torch.manual_seed(1)
    first = [batch["labels"].tolist() for batch in TextTask(str(reviews), BASE).train_dataloader()]
    torch.manual_seed(2)
    assert [batch["labels"].tolist() for batch in TextTask(str(reviews), BASE).train_dataloader()] == first
    assert first[0] != sorted(first[0])


def test_limits(reviews):
    task = TextTask(str(reviews), BASE, max_train_samples=20, max_eval_samples=5)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 20, "validation": 5, "test": 5}


def test_hyper_parameters_make_the_same_task_again(reviews):
    task = TextTask(str(reviews), BASE, group_column="author", batch_size=4, seed=3)
    assert task.hparams["batch_size"] == 4
    assert TextTask(**task.hparams).rows["test"]["text"][:] == task.rows["test"]["text"][:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": "txt"}, "Expected a column 'txt' in .*, but its split 'train' has text, label, author"),
        ({"label_column": "stars"}, "Expected a column 'stars'"),
        ({"group_column": "writer"}, "Expected a column 'writer'"),
        ({"test_split": "final"}, "Expected one of the splits train as test_split, got 'final'"),
        ({"train_split": "all"}, "Expected one of the splits train as train_split, got 'all'"),
        ({"text_columns": ["a", "b", "c"]}, "Expected one text column or a pair"),
        ({"text_columns": []}, "Expected one text column or a pair"),
        ({"test_fraction": 0.0}, "Expected test_fraction between 0 and 0.5, got 0.0"),
        ({"validation_fraction": 1.5}, "Expected validation_fraction between 0 and 0.5, got 1.5"),
        ({"config": "small"}, "Expected config for a data set on the hub, not for files, got 'small'"),
        ({"data_files": "more.csv"}, "Expected data_files with dataset='csv', not together with the file"),
    ],
)
def test_what_does_not_fit_is_named(reviews, options, message):
    with pytest.raises(ValueError, match=message):
        TextTask(str(reviews), BASE, **options).setup("fit")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None] * 20, "label": [0, 1] * 20}, "Expected a text in every row, but 20 of 40 rows"),
        ({"text": [1, 2] * 20, "label": [0, 1] * 20}, "Expected texts in column 'text'"),
        ({"text": ["a", "b"] * 20, "label": [0, None] * 20}, "Expected a label in every row, but 20 of the 40 rows"),
        ({"text": ["a", "b"] * 20, "label": [0.5, 1.0] * 20}, "Expected strings, integers or booleans in label column"),
    ],
)
def test_values_that_do_not_fit_are_counted(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        TextTask(write(tmp_path / "rows.parquet", **columns), BASE).setup("fit")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(ValueError, match=r"Expected a file that ends in \.csv, \.json, \.jsonl, \.parquet, got .*xlsx"):
        TextTask(str(tmp_path / "rows.xlsx"), BASE).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"Expected a file at .*nowhere\.csv"):
        TextTask(str(tmp_path / "nowhere.csv"), BASE).setup("fit")


def test_a_text_can_be_made_of_several_columns(tmp_path):
    rows = make_rows(40)
    choices = [{"text": [author, "nobody"], "label": ["A", "B"]} for author in rows["author"]]
    file = write(tmp_path / "rows.parquet", review=rows["text"], choices=choices, label=rows["label"])
    made = TextTask(file, BASE, text_columns="{review} By {choices[text][0]} or {choices[text][1]}?")
    assert made.input_columns == ["review", "choices"]
    sample, row = made.splits["train"][0], made.rows["train"][0]
    expected = f"{row['review']} By {row['choices']['text'][0]} or nobody?"
    assert list(sample["input_ids"]) == made.tokenizer(expected)["input_ids"]
    pair = TextTask(file, BASE, text_columns=["review", "{choices[text][0]}"])
    sample = pair.splits["train"][0]
    assert list(sample["input_ids"]) == pair.tokenizer(row["review"], row["choices"]["text"][0])["input_ids"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{review} {rating}", "Expected a column 'rating' in"),
        ("{review} {choices[text][2]}", r"Expected a value for {choices\[text\]\[2\]} of"),
        ("{review} {missing}", "Expected a value for {missing} of"),
        ("{review.upper}", r"Expected {column} or {column\[key\]} in the text '{review.upper}', got {review.upper}"),
        ("{review} {}", r"Expected {column} or {column\[key\]} in the text '{review} {}', got {}"),
        ("{review!r}", r"Expected {column} or {column\[key\]}"),
        ("{review", "Expected columns in braces in the text '{review'"),
    ],
)
def test_a_text_of_columns_that_cannot_be_made_is_refused(tmp_path, text, message):
    rows = make_rows(40)
    columns = {"review": rows["text"], "choices": [{"text": ["a", "b"]}] * 40, "missing": ["a"] * 39 + [None]}
    file = write(tmp_path / "rows.parquet", label=rows["label"], **columns)
    with pytest.raises(ValueError, match=message):
        TextTask(file, BASE, text_columns=text, test_split="train", validation_split="train").prepare_data()


def test_a_tokenizer_without_a_token_for_padding_is_given_one(tmp_path, reviews):
    base = save_tiny_llama(tmp_path / "llama", pads=False)
    with pytest.raises(ValueError, match="has no token that fills up batches: name one of its tokens as pad_token"):
        TextTask(str(reviews), base).test_dataloader()
    with pytest.raises(ValueError, match=r"has no token '<pad >' \(pad_token\)"):
        TextTask(str(reviews), base, pad_token="<pad >").load_tokenizer()
    with pytest.raises(ValueError, match=r"fills up batches with '\[PAD\]': leave out the pad_token '<pad>'"):
        TextTask(str(reviews), BASE, pad_token="<pad>").load_tokenizer()
    task = TextTask(str(reviews), base, pad_token="<pad>", label_column="label")
    module = TransformerTask(base)
    module.configure_for(task)
    batch = next(iter(task.test_dataloader()))
    lengths = batch["attention_mask"].sum(1)
    assert (lengths < batch["input_ids"].shape[1]).any(), "some texts are filled up"
    together = module.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, length in enumerate(lengths):
        alone = module(input_ids=batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, msg="what fills up a batch counts for nothing")
