"""How the quickstart finds near-copies and divides rows: in integers and by hashes, so that no release changes it."""

import random
import re
from collections import Counter
from fractions import Fraction
from math import floor, log2

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.data.quickstart.splits import split_by_content


def members(groups: list[int]) -> set[frozenset[int]]:
    return {frozenset(row for row, other in enumerate(groups) if other == group) for group in groups}


def reference_groups(texts: list[str], similarity: Fraction) -> set[frozenset[int]]:
    """Pair by pair, in fractions, and groups joined until no pair is left to join."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    counts = Counter(word for found in words for word in found)
    weight = {word: 1 + floor(log2(len(texts) / count)) for word, count in counts.items()}

    def alike(one: int, other: int) -> bool:
        either = sum(weight[word] for word in words[one] | words[other])
        shared = sum(weight[word] for word in words[one] & words[other])
        return Fraction(shared, either) >= similarity

    groups = list(range(len(texts)))
    for one in range(len(texts)):
        for other in range(one):
            if alike(one, other):
                groups = [groups[one] if group == groups[other] else group for group in groups]
    return members(groups)


TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.sampled_from([Fraction(1, 3), Fraction(1, 2), Fraction(2, 3)]))
def test_groups_are_those_of_exact_arithmetic(texts, similarity):
    """With few words, many pairs of texts are exactly as similar as the bound."""
    assert members(similar_groups(texts, similarity)) == reference_groups(texts, similarity)


def test_a_pair_at_the_bound_is_alike_and_one_below_is_not():
    texts = ["red apple", "red pear", "blue sky", "wide sea"]  # red weighs 2, apple and pear 3 each: 2 of 8
    assert members(similar_groups(texts, Fraction(2, 8))) == {frozenset({0, 1}), frozenset({2}), frozenset({3})}
    assert len(members(similar_groups(texts, Fraction(2001, 8000)))) == 4


def make_table(num_groups: int = 300) -> datasets.Dataset:
    """Groups of one to four rows; a row is of one of three classes, in proportions 5 : 3 : 2."""
    draw = random.Random(0)
    rows = [
        {"text": f"{group} {row}", "labels": draw.choices(range(3), (5, 3, 2))[0], "group": group}
        for group in range(num_groups)
        for row in range(draw.randint(1, 4))
    ]
    return datasets.Dataset.from_list(rows)


def contents(table: datasets.Dataset, seed: int = 0) -> dict[str, set[str]]:
    return {name: set(split["text"]) for name, split in split_by_content(table, seed).items()}


def test_every_row_is_in_one_split_and_every_group_too():
    table = make_table()
    splits = split_by_content(table, 0)
    assert sorted(text for split in splits.values() for text in split["text"]) == sorted(table["text"])
    groups = [set(split["group"]) for split in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_a_tenth_of_every_class_is_held_out_for_each_purpose():
    table = make_table()
    whole = Counter(table["labels"])
    splits = split_by_content(table, 0)
    for name in ("validation", "test"):
        for label, count in Counter(splits[name]["labels"]).items():
            assert 0.9 * whole[label] / 10 - 1 < count <= whole[label] / 10


@pytest.mark.parametrize("seed", range(3))
def test_neither_the_order_of_the_rows_nor_the_numbers_of_the_groups_matter(seed):
    table = make_table()
    other = table.map(lambda row: {"group": 7 * row["group"] % 1009}).shuffle(seed=seed)
    assert contents(other) == contents(table)


def test_the_seed_decides():
    assert contents(make_table(), 1)["test"] != contents(make_table(), 0)["test"]


def test_rows_keep_their_order():
    table = make_table()
    place = {text: number for number, text in enumerate(table["text"])}
    for split in split_by_content(table, 0).values():
        places = [place[text] for text in split["text"]]
        assert places == sorted(places)


def test_a_group_larger_than_a_split_stays_in_train():
    rows = [{"text": str(row), "labels": 0, "group": 0 if row < 20 else row} for row in range(100)]
    for seed in range(20):
        splits = split_by_content(datasets.Dataset.from_list(rows), seed)
        assert {str(row) for row in range(20)} <= set(splits["train"]["text"])
        assert len(splits["test"]) == len(splits["validation"]) == 10
