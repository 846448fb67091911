"""How the right choice is said, and what ratings make of it."""

import datasets
import pytest
import torch

from lightning_drm.kinds import Choice

ROWS = [["red", "green", "blue"], ["one", "two", "three"]]


def encode(labels: list, choices: list[list[str]] = ROWS, feature: object = None) -> tuple[Choice, list[int]]:
    table = datasets.Dataset.from_dict({"choices": choices, "answer": labels})
    if feature is not None:
        table = table.cast_column("answer", feature)
    kind = Choice()
    return kind, kind.encode(datasets.DatasetDict({"train": table}), "answer")["train"]["labels"][:]


@pytest.mark.parametrize(
    "labels", [[1, 2], ["1", "2"], ["B", "C"], ["green", "three"]], ids=["number", "digit", "letter", "text"]
)
def test_the_right_choice_by_number_letter_or_text(labels):
    kind, numbers = encode(labels)
    assert numbers == [1, 2]
    assert kind.num_choices == 3
    assert kind.sizes(1)["num_classes"] == 3


def test_the_right_choice_by_a_class_that_the_data_name():
    assert encode([2, 0], feature=datasets.ClassLabel(names=["A", "B", "C"]))[1] == [2, 0]


def test_a_text_that_is_also_a_letter_is_a_text():
    assert encode(["A", "B"], [["B", "A"], ["A", "B"]])[1] == [1, 1]


@pytest.mark.parametrize(
    "labels", [[1, 3], [-1, 0], ["A", "D"], ["green", "four"], [None, 1], [0.5, 1.0], [True, False]]
)
def test_labels_that_say_no_choice_are_refused_with_their_row(labels):
    wanted = r"Expected the right choice's number \(0 to 2\), letter \(A to C\) or text in column 'answer', got "
    with pytest.raises(ValueError, match=rf"{wanted}.* in row \d of 'train', whose choices are \['"):
        encode(labels)


def test_two_right_choices_are_refused():
    with pytest.raises(ValueError, match="got 'red' in row 1 of 'train'"):
        encode(["red", "red"], [["red", "blue"], ["red", "red"]])


def test_rows_have_the_same_number_of_choices():
    with pytest.raises(
        ValueError, match=r"same number of choices in every row, .* got 2 in row 1 of 'train'; 3 in row 0"
    ):
        encode([0, 0], [["a", "b", "c"], ["a", "b"]])
    with pytest.raises(ValueError, match="two or more, got 1 in row 0"):
        encode([0, 0], [["a"], ["b"]])


def test_loss_and_probabilities_compare_the_choices_of_one_question():
    torch.manual_seed(0)
    ratings, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    exponents = ratings.double().exp()
    expected = exponents / exponents.sum(1, keepdim=True)
    kind = Choice()
    probabilities, target = kind.prediction(ratings, labels)
    assert torch.allclose(probabilities.double(), expected)
    assert torch.equal(target, labels)
    assert float(kind.loss(ratings, labels)) == pytest.approx(float(-expected[range(4), labels].log().mean()))
    assert float(kind.loss(ratings.reshape(12, 1), labels)) == float(kind.loss(ratings, labels))
