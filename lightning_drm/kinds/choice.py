"""One of several answers to a question."""

import string
from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, Value
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_drm.kinds.kind import LABELS, Kind

CHOICES = "choices"
"""The column with each row's choices, a list of texts."""


class Choice(Kind):
    """One of several answers, as many in every row. The score is micro accuracy.

    A head with one output rates each answer together with its question; the probabilities are the softmax over a
    question's answers. Labels are the right answer's number from 0 on, its letter from A on, or its text.

    Example:
        >>> import torch
        >>> Choice().prediction(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        (tensor([[0.5000, 0.5000]]), tensor([1]))
    """

    auto_class: ClassVar[Mapping[str, str]] = {"text": "AutoModelForSequenceClassification"}
    several_vectors: ClassVar[bool] = True

    def __init__(self) -> None:
        self.num_choices: int | None = None

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        counts: dict[int, tuple[int, str]] = {}
        for name, table in splits.items():
            for row, choices in enumerate(table[CHOICES][:]):
                counts.setdefault(len(choices), (row, name))
        if len(counts) > 1 or min(counts, default=0) < 2:
            found = "; ".join(f"{count} in row {row} of {name!r}" for count, (row, name) in sorted(counts.items()))
            raise ValueError(f"Expected the same number of choices in every row, two or more, got {found or 'none'}.")
        self.num_choices = next(iter(counts))
        numbers = {name: _numbers(table, name, column, self.num_choices) for name, table in splits.items()}
        return DatasetDict(
            {
                name: table.remove_columns([column])
                .add_column(LABELS, numbers[name])
                .cast_column(LABELS, Value("int64"))
                for name, table in splits.items()
            }
        )

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        """One: how good a choice is."""
        return 1

    @override
    def sizes(self, num_outputs: int) -> dict[str, Any]:
        return {"num_classes": self.num_choices, "task": "multiclass"}

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.num_choices, average="micro")}

    @override
    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Ratings ``(batch, choices)`` of inputs ``(batch, choices, tokens)``."""
        batch = len(next(iter(inputs.values())))
        ratings: Tensor = model(**{name: tensor.flatten(0, 1) for name, tensor in inputs.items()}).logits
        return ratings.reshape(batch, -1)

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the choices; also of ratings that are not yet ordered by question."""
        return functional.cross_entropy(logits.reshape(len(labels), -1), labels)

    @override
    def class_logits(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return logits.reshape(len(labels), -1)

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1), labels


def _numbers(table: Dataset, split: str, column: str, num_choices: int) -> list[int]:
    """The right choices' numbers."""
    labels, choices = table[column][:], table[CHOICES][:]
    letters = string.ascii_uppercase[:num_choices]
    names = {name: number for names in (letters, map(str, range(num_choices))) for number, name in enumerate(names)}
    are_texts = all(label in row for label, row in zip(labels, choices, strict=True))
    found = []
    for row, (label, texts) in enumerate(zip(labels, choices, strict=True)):
        number = texts.index(label) if are_texts else names.get(str(label))
        if number is None or (are_texts and texts.count(label) > 1):
            raise ValueError(
                f"Expected the right choice's number (0 to {num_choices - 1}), letter (A to {letters[-1]}) or text in "
                f"column {column!r}, got {label!r} in row {row} of {split!r}, whose choices are {texts}."
            )
        found.append(number)
    return found
