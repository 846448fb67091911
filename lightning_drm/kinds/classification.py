"""One class per sample."""

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import ClassLabel, DatasetDict, Value
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS, Kind


class Classification(Kind):
    """One class per sample: labels are strings, integers, booleans or `ClassLabel`. The score is micro accuracy.

    Example:
        >>> import torch
        >>> kind = Classification()
        >>> kind.prediction(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        (tensor([[0.5000, 0.5000]]), tensor([1]))
    """

    auto_class: ClassVar[Mapping[str, str]] = {
        "text": "AutoModelForSequenceClassification",
        "image": "AutoModelForImageClassification",
    }

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        return encode_classes(splits, column)

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        return len(self.classes(splits))

    @override
    def classes(self, splits: DatasetDict) -> list[str]:
        return list(splits["train"].features[LABELS].names)

    @override
    def strata(self, labels: Any) -> Any:
        return labels

    @override
    def sizes(self, num_outputs: int) -> dict[str, Any]:
        return {"num_classes": num_outputs, "task": "multiclass", "ignore_index": IGNORE_INDEX}

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(num_outputs, average="micro", ignore_index=IGNORE_INDEX)}

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)

    @override
    def class_logits(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return logits

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1), labels  # torchmetrics would guess by a batch's values whether they are logits

    @override
    def count(self, labels: Tensor) -> int:
        return int((labels != IGNORE_INDEX).sum())

    @override
    def check(self, splits: DatasetDict, dataset: str) -> None:
        names = self.classes(splits)
        trained = set(splits["train"].unique(LABELS))
        if len(trained) < 2:
            found = f"only {names[next(iter(trained))]!r}" if trained else "no rows"
            raise ValueError(f"Expected two classes or more in the training split of {dataset!r}, found {found}.")
        for split, table in splits.items():
            if unseen := sorted(set(table.unique(LABELS)) - trained):
                raise ValueError(
                    f"Expected the labels of the training split in the split {split!r} of {dataset!r}, found "
                    f"{', '.join(repr(names[label]) for label in unseen)} too."
                )


def encode_classes(splits: DatasetDict, column: str) -> DatasetDict:
    """Renames the label column to `labels` and makes it a `ClassLabel`, with the same classes in every split.

    Classes that the data names itself keep their order; others are sorted by value, so that 10 comes after 9.

    Args:
        splits: The tables.
        column: The label column.

    Raises:
        ValueError: If a label is missing or is neither a string, an integer nor a boolean.
    """
    feature = next(iter(splits.values())).features[column]
    if not isinstance(feature, ClassLabel):
        splits = _with_class_label(splits, column)
    for name, table in splits.items():
        num_missing = sum(label is None or label < 0 for label in table[column])
        if num_missing:
            raise ValueError(
                f"Expected a label in every row, but {num_missing} of the {len(table)} rows of the split {name!r} have "
                f"none in column {column!r}: use another split or leave those rows out."
            )
    return splits if column == LABELS else splits.rename_column(column, LABELS)


def _with_class_label(splits: DatasetDict, column: str) -> DatasetDict:
    dtype = {name: getattr(table.features[column], "dtype", "nested") for name, table in splits.items()}
    for name, kind in dtype.items():
        if not kind.startswith(("int", "uint", "bool", "string", "large_string")):
            raise ValueError(
                f"Expected strings, integers or booleans in label column {column!r}, got {kind} in {name!r}; for other "
                "labels say which kind of task this is, such as kind: Regression."
            )
    if len(set(dtype.values())) > 1:
        raise ValueError(f"Expected one type of label in every split, got {dtype} in column {column!r}.")
    values = {value for table in splits.values() for value in table.unique(column)} - {None}
    names = [str(value).lower() if isinstance(value, bool) else str(value) for value in sorted(values)]  # as Arrow does
    return splits.cast_column(column, Value("string")).cast_column(column, ClassLabel(names=names))
