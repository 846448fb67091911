"""Entities and their F1, against the rules of ``conlleval`` as its script states them, and results of ``seqeval``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_drm.kinds import IGNORE_INDEX, EntityF1
from lightning_drm.kinds.entities import are_entity_tags, entities

TAGS = ["O", "B-x", "I-x", "E-x", "S-x", "B-y-z", "I-y-z", "E-y-z", "S-y-z"]
SENTENCES = st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=9), min_size=1, max_size=4)


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Its tables of when a chunk ends and when one starts, each asked by itself."""
    ends = {("B", "B"), ("B", "O"), ("B", "S"), ("I", "B"), ("I", "O"), ("I", "S")}
    starts = {("E", "E"), ("E", "I"), ("O", "E"), ("O", "I"), ("S", "E"), ("S", "I")}
    found, begin, last = set(), 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        pair, kinds = (last[0], tag[0]), (last[2:], tag[2:])
        if pair in ends or last[0] in "ES" or (last != "O" and kinds[0] != kinds[1]):
            found.add((kinds[0], begin, place - 1))
        if pair in starts or tag[0] in "BS" or (tag != "O" and kinds[0] != kinds[1]):
            begin = place
        last = tag
    return found


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_those_of_conlleval(tags: list[str]):
    assert entities(tags) == conlleval(tags)


def numbers(sentences: list[list[str]], length: int, padding: int) -> torch.Tensor:
    return torch.tensor([[TAGS.index(tag) for tag in row] + [padding] * (length - len(row)) for row in sentences])


def scored(predicted: list[list[str]], actual: list[list[str]]) -> EntityF1:
    metric = EntityF1(TAGS)
    length = max(map(len, actual))
    metric.update(numbers(predicted, length, 1), numbers(actual, length, IGNORE_INDEX))
    return metric


@given(SENTENCES, st.randoms(use_true_random=False))
def test_f1_counts_whole_entities_sentence_by_sentence(actual, draw):
    predicted = [[tag if draw.random() < 0.6 else draw.choice(TAGS) for tag in row] for row in actual]
    ours = [(n, *e) for n, row in enumerate(predicted) for e in conlleval(row)]
    theirs = [(n, *e) for n, row in enumerate(actual) for e in conlleval(row)]
    right = len(set(ours) & set(theirs))
    precision, recall = right / max(1, len(ours)), right / max(1, len(theirs))
    expected = 2 * precision * recall / (precision + recall) if right else 0.0
    assert float(scored(predicted, actual).compute()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),  # as seqeval 1.2.2 computes it
    [
        ([["B-x", "I-x", "O", "I-x"]], [["B-x", "I-x", "O", "B-x"]], 1.0),
        ([["B-x", "I-y-z", "O"]], [["B-x", "I-x", "O"]], 0.0),
        ([["O", "B-x", "I-x"], ["S-x"]], [["O", "B-x", "I-x"], ["O"]], 2 / 3),
        ([["B-x", "E-x", "I-x", "I-x"]], [["B-x", "E-x", "B-x", "I-x"]], 1.0),
        ([["O", "O"]], [["O", "O"]], 0.0),
    ],
)
def test_results_of_seqeval(predicted, actual, expected):
    assert float(scored(predicted, actual).compute()) == pytest.approx(expected)


def test_tokens_that_do_not_count_neither_part_nor_join_entities():
    """Words of several tokens: only the first one's tag is looked at."""
    tags = ["B-x", "I-x", "O"]
    metric = EntityF1(tags)
    metric.update(torch.tensor([[2, 0, 2, 1, 0]]), torch.tensor([[-100, 0, -100, 1, -100]]))
    assert (int(metric.found), int(metric.predicted), int(metric.actual)) == (1, 1, 1)


def test_probabilities_count_by_the_largest():
    metric = EntityF1(["B-x", "O"])
    probabilities = torch.tensor([[[0.6, 0.1, 0.4], [0.4, 0.9, 0.6]]])  # a sentence, two tags, three tokens
    metric.update(probabilities, torch.tensor([[0, 1, 0]]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_bilou_is_iobes_by_other_letters():
    assert entities(["B-x", "L-x", "U-x", "O"]) == entities(["B-x", "E-x", "S-x", "O"]) == {("x", 0, 1), ("x", 2, 2)}


@pytest.mark.parametrize("tags", [["NN", "VB"], ["B", "I", "O"], ["O"], ["B-x", "other", "O"], ["B-", "O"]])
def test_other_tags_are_none_of_entities(tags):
    assert not are_entity_tags(tags)
    with pytest.raises(ValueError, match="Expected tags such as B-place"):
        EntityF1(tags)
