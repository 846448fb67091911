"""Labels as people have them: several per row, or numbers; what is learned from them, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from helpers.sample_rows import BASE
from lightning_drm.data import TextTask
from lightning_drm.kinds import MultiLabel, Regression


def splits(**columns) -> DatasetDict:
    return DatasetDict({"train": Dataset.from_dict(columns), "test": Dataset.from_dict(columns)})


@pytest.mark.parametrize(
    ("kind", "rows", "names"),
    [
        (MultiLabel(), [["b", "a"], [], ["c"], ["a", "a"]], ["a", "b", "c"]),
        (MultiLabel(), [[10, 9], [], [100], [9]], ["9", "10", "100"]),
        (MultiLabel(separator=","), ["b, a", "", "c", "a"], ["a", "b", "c"]),
        (MultiLabel(multi_hot=True), [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]], ["0", "1", "2"]),
        (MultiLabel(multi_hot=True), [[True, True], [False, False], [False, True], [True, False]], ["0", "1"]),
    ],
)
def test_several_labels_become_zeros_and_ones(kind, rows, names):
    encoded = kind.encode(splits(tags=rows, text=["x"] * 4), "tags")
    assert kind.classes(encoded) == names
    assert kind.num_outputs(encoded) == len(names)
    hot = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]] if len(names) == 3 else rows
    for table in encoded.values():
        assert table["labels"][:] == hot
        assert table.column_names == ["text", "labels"]


def test_names_that_the_data_give_keep_their_order():
    features = Features({"tags": List(ClassLabel(names=["z", "a", "never"])), "text": Value("string")})
    table = Dataset.from_dict({"tags": [[0], [1, 0]], "text": ["x", "y"]}, features=features)
    kind = MultiLabel()
    encoded = kind.encode(DatasetDict({"train": table}), "tags")
    assert kind.classes(encoded) == ["z", "a", "never"]
    with pytest.raises(ValueError, match="every label in the training split of 'x', found none of never"):
        kind.check(encoded, "x")


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (MultiLabel(), ["a,b", "c"], "list of labels in every row of column 'tags', got 'a,b' in row 0 .*separator"),
        (MultiLabel(separator=","), [None, "c"], "list of labels in every row of column 'tags', got None in row 0"),
        (MultiLabel(multi_hot=True), [[1, 0], [1]], r"lists of one length in column 'tags', got lengths \[1, 2\]"),
        (MultiLabel(multi_hot=True), [[1, 2], [0, 0]], "0 and 1 in column 'tags' with multi_hot, got .*2"),
        (Regression(), ["a", "b"], "numbers in label column 'tags', got string in 'train'"),
        (Regression(), [1.0, float("nan")], "finite number in every row, but 1 of the 2 rows of the split 'train'"),
        (Regression(), [1, None], "finite number in every row, but 1 of the 2 rows"),
    ],
)
def test_other_labels_are_refused(kind, rows, message):
    with pytest.raises(ValueError, match=message):
        kind.encode(splits(tags=rows), "tags")


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="separator for strings or multi_hot for lists of 0 and 1, got both"):
        MultiLabel(separator=",", multi_hot=True)


def test_rare_labels_are_on_both_sides(tmp_path):
    file = tmp_path / "rows.json"
    tags = [["common", "rare"] if row % 20 == 0 else ["common"] if row % 2 else [] for row in range(200)]
    Dataset.from_dict({"text": [f"text {row}" for row in range(200)], "label": tags}).to_json(file)
    task = TextTask(str(file), BASE, kind=MultiLabel(), max_train_samples=80)
    assert task.class_names == ["common", "rare"]
    for split, num in {"train": 80, "validation": 20, "test": 20}.items():
        hot = np.array(task.rows[split]["labels"][:])
        assert len(hot) == num
        assert hot[:, 1].mean() == pytest.approx(0.05, abs=0.02)
    batch = next(iter(task.test_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].shape == (20, 2)


def test_numbers_are_labels_as_they_are(tmp_path):
    file, numbers = tmp_path / "rows.csv", [row / 3 for row in range(50)]
    Dataset.from_dict({"text": [f"text {row}" for row in range(50)], "label": numbers}).to_csv(file)
    task = TextTask(str(file), BASE, kind=Regression())
    assert task.num_classes == 1
    assert list(task.metrics().metrics) == ["pearson", "spearman", "mse"]
    with pytest.raises(AttributeError, match="Regression tasks have no classes"):
        _ = task.class_names
    everything = sorted(value for split in task.rows.values() for value in split["labels"])
    assert everything == pytest.approx(numbers)
    assert next(iter(task.test_dataloader()))["labels"].dtype == torch.float32


def test_one_number_only_is_refused(tmp_path):
    file = tmp_path / "rows.csv"
    Dataset.from_dict({"text": [f"text {row}" for row in range(50)], "label": [2.5] * 50}).to_csv(file)
    with pytest.raises(ValueError, match=r"different numbers as labels in the split .* found one value only"):
        TextTask(str(file), BASE, kind=Regression()).prepare_data()


def test_two_tasks_may_share_a_kind(tmp_path):
    kind, tasks = MultiLabel(separator=","), []
    for names in (["a", "b"], ["x", "y", "z"]):
        file = tmp_path / f"{names[0]}.csv"
        Dataset.from_dict({"text": [f"t {row}" for row in range(60)], "label": [",".join(names)] * 60}).to_csv(file)
        tasks.append(TextTask(str(file), BASE, kind=kind))
    assert [task.num_classes for task in tasks] == [2, 3]
    assert [task.num_classes for task in tasks] == [2, 3]


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float64)


def test_losses_and_predictions():
    torch.manual_seed(0)
    logits, hot = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    probability = 1 / (1 + np.exp(-float64(logits)))
    expected = -(float64(hot) * np.log(probability) + (1 - float64(hot)) * np.log(1 - probability)).mean()
    assert float(MultiLabel().loss(logits, hot)) == pytest.approx(expected, rel=1e-6)
    predictions, targets = MultiLabel().prediction(logits, hot)
    assert predictions.numpy() == pytest.approx(probability, rel=1e-5)
    assert targets.dtype == torch.int32
    numbers, labels = torch.randn(6, 1), torch.randn(6)
    expected = ((float64(numbers)[:, 0] - float64(labels)) ** 2).mean()
    assert float(Regression().loss(numbers, labels)) == pytest.approx(expected, rel=1e-6)
    assert Regression().prediction(numbers, labels)[0].shape == (6,)


def test_hub_columns_of_floats_are_no_classes(tmp_path):
    file = tmp_path / "rows.csv"
    Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.5]}).to_csv(file)
    with pytest.raises(ValueError, match=r"strings, integers or booleans in label column 'label', got float64 .*kind"):
        TextTask(str(file), BASE).prepare_data()
