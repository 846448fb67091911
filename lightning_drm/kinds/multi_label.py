"""Any number of labels per sample."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, List, Value
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MultilabelF1Score
from typing_extensions import override

from lightning_drm.kinds.columns import with_labels
from lightning_drm.kinds.kind import LABELS, Kind


class MultiLabel(Kind):
    """Any number of labels per sample. The score is micro F1 at a probability of 0.5.

    A row's labels are a list of names or numbers, or a list of 0 and 1 with one place per label.

    Args:
        separator: Splits a column of strings into lists, such as ``","`` for ``"sport,politics"``.
        multi_hot: Whether rows are lists of 0 and 1; otherwise, lists of what is present.
    """

    auto_class: ClassVar[Mapping[str, str]] = {
        "text": "AutoModelForSequenceClassification",
        "image": "AutoModelForImageClassification",
    }

    def __init__(self, separator: str | None = None, multi_hot: bool = False) -> None:
        if separator == "":
            raise ValueError("Expected at least one character in separator, got an empty one.")
        if separator is not None and multi_hot:
            raise ValueError("Expected separator for strings or multi_hot for lists of 0 and 1, got both.")
        self.separator = separator
        self.multi_hot = multi_hot

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        rows: dict[str, Any] = {name: self._rows(table, name, column) for name, table in splits.items()}
        if self.multi_hot:
            names, hot = _names_of_places(rows, column), rows
        else:
            names, hot = _hot(rows, next(iter(splits.values())).features[column])
        self._names, feature = names, List(Value("float32"), length=len(names))
        return DatasetDict(
            {
                split: with_labels(table, column, [list(map(float, row)) for row in hot[split]], feature)
                for split, table in splits.items()
            }
        )

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        return len(self._names)

    @override
    def classes(self, splits: DatasetDict) -> list[str]:
        return self._names

    @override
    def strata(self, labels: Any) -> Any:
        """The rarest of a sample's labels (0 for none), so that also rare ones are on both sides."""
        hot = np.asarray(labels)
        order = np.argsort(hot.sum(0), kind="stable")
        found = hot[:, order] > 0
        return np.where(found.any(1), found.argmax(1) + 1, 0)

    @override
    def sizes(self, num_outputs: int) -> dict[str, Any]:
        return {"num_labels": num_outputs, "task": "multilabel"}

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        return {"f1": MultilabelF1Score(num_outputs, average="micro")}

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits))

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid(), labels.int()

    @override
    def check(self, splits: DatasetDict, dataset: str) -> None:
        if len(self._names) < 2:
            raise ValueError(f"Expected two labels or more in {dataset!r}, found {len(self._names)}.")
        seen = np.asarray(splits["train"][LABELS][:]).sum(0) > 0
        if missing := [name for name, is_seen in zip(self._names, seen, strict=True) if not is_seen]:
            raise ValueError(
                f"Expected every label in the training split of {dataset!r}, found none of {', '.join(missing)}."
            )

    def _rows(self, table: Dataset, split: str, column: str) -> list[Sequence[Any]]:
        values = table[column][:]
        if self.separator is not None and all(isinstance(value, str) for value in values):
            values = [[part.strip() for part in value.split(self.separator) if part.strip()] for value in values]
        wrong = [number for number, value in enumerate(values) if not isinstance(value, list | tuple)]
        if wrong:
            raise ValueError(
                f"Expected a list of labels in every row of column {column!r}, got {values[wrong[0]]!r} in row "
                f"{wrong[0]} of {split!r}" + ("." if self.separator else "; for strings, give the kind a separator.")
            )
        return list(values)


def _names_of_places(rows: Mapping[str, list[Sequence[Any]]], column: str) -> list[str]:
    """Names for the places of lists of 0 and 1."""
    lengths = {len(row) for split in rows.values() for row in split}
    if len(lengths) != 1:
        raise ValueError(f"Expected lists of one length in column {column!r}, got lengths {sorted(lengths)[:5]}.")
    if strange := {value for split in rows.values() for row in split for value in row} - {0, 1}:
        raise ValueError(f"Expected 0 and 1 in column {column!r} with multi_hot, got {sorted(map(str, strange))[:5]}.")
    return [str(place) for place in range(lengths.pop())]


def _hot(rows: Mapping[str, list[Sequence[Any]]], feature: Any) -> tuple[list[str], dict[str, list[list[int]]]]:
    """Names, and rows of 0 and 1, from lists of what is present."""
    item = getattr(feature, "feature", None)
    if isinstance(item, ClassLabel):
        values, names = list(range(item.num_classes)), list(item.names)
    else:
        values = sorted({value for split in rows.values() for row in split for value in row})
        names = [str(value) for value in values]
    return names, {
        split: [[int(value in present) for value in values] for present in map(set, lists)]
        for split, lists in rows.items()
    }
