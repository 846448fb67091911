"""What a tagging task is measured and trained by."""

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from torchmetrics.classification import MulticlassAccuracy

from lightning_drm.kinds import EntityF1, Tokens, make_metrics


def encoded(tags: list[list], **other: list[list]) -> tuple[Tokens, datasets.DatasetDict]:
    kind = Tokens()
    return kind, kind.encode(tables({"train": tags, **other}), "tags")


def tables(splits: dict[str, list]) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"number": range(len(rows)), "tags": rows}) for name, rows in splits.items()}
    )


def test_tags_are_numbered_alike_in_every_split():
    kind, splits = encoded([["O", "B-x"], ["I-x"]], test=[["I-x", "O"]])
    assert kind.classes(splits) == ["B-x", "I-x", "O"]
    assert splits["train"]["labels"][:] == [[2, 0], [1]]
    assert splits["test"]["labels"][:] == [[1, 2]]
    assert kind.num_outputs(splits) == 3


def test_tags_that_the_data_name_keep_their_order():
    feature = datasets.List(datasets.ClassLabel(names=["O", "B-x", "I-x"]))
    kind = Tokens()
    splits = kind.encode(tables({"train": [[0, 1], [2]]}).cast_column("tags", feature), "tags")
    assert kind.classes(splits) == ["O", "B-x", "I-x"]
    assert splits["train"]["labels"][:] == [[0, 1], [2]]
    assert isinstance(kind.metrics(3)["entity_f1"], EntityF1)


def test_integers_are_tags_by_their_value():
    kind, splits = encoded([[10, 9], [2]])
    assert kind.classes(splits) == ["2", "9", "10"]
    assert splits["train"]["labels"][:] == [[2, 1], [0]]


def test_entities_are_judged_whole_and_other_tags_one_by_one():
    kind, splits = encoded([["O", "B-x", "I-x"]])
    assert list(kind.metrics(kind.num_outputs(splits))) == ["entity_f1", "accuracy"]
    kind, splits = encoded([["NOUN", "VERB"]])
    (accuracy,) = kind.metrics(kind.num_outputs(splits)).values()
    assert isinstance(accuracy, MulticlassAccuracy)
    accuracy.update(*kind.prediction(torch.eye(2)[torch.tensor([[0, 1, 1, 0]])], torch.tensor([[-100, 1, 0, -100]])))
    assert float(accuracy.compute()) == 0.5


def test_metrics_of_users_are_filled_in_and_leave_padding_out():
    kind, splits = encoded([["a", "b", "c"]])
    (metric,) = make_metrics(
        {"class_path": "torchmetrics.classification.MulticlassF1Score", "init_args": {"average": "macro"}},
        kind.sizes(kind.num_outputs(splits)),
    ).values()
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, 3), torch.randint(3, (5, 7))
    labels[:, 0], labels[2, 4:] = -100, -100
    metric.update(*kind.prediction(logits, labels))
    counts = labels != -100
    expected = f1_score(labels[counts], logits.argmax(-1)[counts], average="macro")
    assert float(metric.compute()) == pytest.approx(expected)


def test_entity_f1_may_be_asked_for_by_name():
    kind, splits = encoded([["O", "B-x"]])
    (metric,) = make_metrics("lightning_drm.kinds.EntityF1", kind.sizes(kind.num_outputs(splits))).values()
    assert metric.tags == ["B-x", "O"]


def test_loss_is_the_mean_over_tagged_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[-100, 0, 2, -100], [-100, 1, -100, -100]])
    log = logits.double().log_softmax(-1)
    expected = -(log[0, 1, 0] + log[0, 2, 2] + log[1, 1, 1]) / 3
    assert float(Tokens().loss(logits, labels)) == pytest.approx(float(expected))
    assert float(Tokens().loss(logits, torch.full_like(labels, -100))) == 0


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"tags": ["a", "b"]}, r"Expected a list of tags, .* column 'tags', got Value\('string'\) in the split 'tags'"),
        ({"tags": [[0.5], [1.5]]}, "Expected a list of tags, which are strings or integers"),
        ({"tags": [["a", None], ["b"]]}, r"Expected a tag for every word, got \['a', None\] in row 0 of the split"),
        ({"train": [["a"]], "test": [[1]]}, "Expected one type of tag in every split, got strings and integers"),
    ],
)
def test_columns_without_tags_are_refused(splits, message):
    with pytest.raises(ValueError, match=message):
        Tokens().encode(tables(splits), "tags")


def test_tags_that_training_does_not_have_are_named():
    kind, splits = encoded([["a", "b"]], test=[["c", "a"]])
    with pytest.raises(ValueError, match=r"tags of the training split in the split 'test' of 'rows', found 'c' too"):
        kind.check(splits, "rows")
    kind, splits = encoded([["a", "a"]])
    with pytest.raises(ValueError, match="Expected two tags or more in the training split of 'rows', found a"):
        kind.check(splits, "rows")
