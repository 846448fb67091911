from collections import Counter

import datasets
import pytest

from helpers.sample_rows import make_rows
from lightning_drm.data.splits import complete, limit
from lightning_drm.kinds.classification import encode_classes as encode_labels

FRACTIONS = {"validation_fraction": 0.1, "test_fraction": 0.2}


@pytest.fixture
def table():
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict(make_rows(200))})
    return encode_labels(rows, "label")["train"]


def splits_of(table, **options):
    return complete(datasets.DatasetDict({"train": table}), **FRACTIONS, **{"seed": 0, **options})


def test_missing_splits_are_fractions_of_all_rows_and_share_none(table):
    splits = splits_of(table)
    assert {name: len(split) for name, split in splits.items()} == {"train": 140, "validation": 20, "test": 40}
    assert sorted(text for split in splits.values() for text in split["text"]) == sorted(table["text"])


def test_every_class_keeps_its_share(table):
    for split in splits_of(table).values():
        shares = {label: count / len(split) for label, count in Counter(split["labels"]).items()}
        assert shares == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2}, abs=1 / len(split))


def test_rows_of_a_group_stay_together(table):
    splits = splits_of(table, group_column="author")
    authors = [set(split["author"]) for split in splits.values()]
    assert sum(map(len, authors)) == len(set.union(*authors)) == 50
    assert len(splits["test"]) == pytest.approx(40, abs=4)
    assert len(splits["validation"]) == pytest.approx(20, abs=4)


@pytest.mark.parametrize("group_column", [None, "author"])
def test_the_seed_decides(table, group_column):
    first, again, other = (
        splits_of(table, group_column=group_column, seed=seed)["test"]["text"][:] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_splits_that_exist_are_kept(table):
    given = datasets.DatasetDict({"train": table.select(range(100)), "test": table.select(range(100, 200))})
    splits = complete(given, **FRACTIONS, seed=0)
    assert splits["test"]["text"][:] == given["test"]["text"][:]
    assert (len(splits["train"]), len(splits["validation"])) == (90, 10)


@pytest.mark.parametrize("num_samples", [1, 7, 50, 199])
def test_a_limit_keeps_the_proportions(table, num_samples):
    limited = limit(table, num_samples, seed=0)
    assert len(set(limited["text"])) == len(limited) == num_samples
    counts = Counter(limited["labels"])
    for label, share in {0: 0.5, 1: 0.3, 2: 0.2}.items():
        assert counts[label] == pytest.approx(share * num_samples, abs=1)


def test_a_limit_above_the_size_changes_nothing(table):
    assert limit(table, 1000, seed=0) is table
    assert limit(table, None, seed=0) is table


def test_too_few_rows_or_groups_are_refused(table):
    with pytest.raises(ValueError, match="Expected enough rows and groups of every class to hold out 20%"):
        splits_of(table.select([0, 5, 6]))
    with pytest.raises(ValueError, match="5 groups are needed in 'author', there are 4"):
        splits_of(table.select(range(16)), group_column="author")
