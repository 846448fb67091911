"""One tag per word: entities, parts of speech."""

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import ClassLabel, DatasetDict, List
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_drm.kinds.columns import with_labels
from lightning_drm.kinds.entities import EntityF1, are_entity_tags
from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS, Kind


class Tokens(Kind):
    """One tag for each word of a text, given to the word's first token; other tokens count for nothing.

    The score is the F1 of whole entities where the tags say where entities begin and end (``B-place``, ``I-place``,
    ``O``; see `EntityF1`), and micro accuracy of the tags where they do not (parts of speech). What does not fit into a
    text's maximal length is cut off with its tags, in training and in evaluation.

    Example:
        >>> import torch
        >>> kind = Tokens()
        >>> probabilities, target = kind.prediction(torch.zeros(1, 4, 2), torch.tensor([[-100, 0, 1, -100]]))
        >>> probabilities.shape, kind.count(target)
        (torch.Size([1, 2, 4]), 2)
    """

    auto_class: ClassVar[Mapping[str, str]] = {"text": "AutoModelForTokenClassification"}
    pools: ClassVar[bool] = False
    by_tokens: ClassVar[bool] = True

    def __init__(self) -> None:
        self._names: list[str] = []

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        items = {name: getattr(table.features[column], "feature", None) for name, table in splits.items()}
        if wrong := [name for name, item in items.items() if not isinstance(item, ClassLabel) and not _are_tags(item)]:
            raise ValueError(
                f"Expected a list of tags, which are strings or integers, in every row of column {column!r}, got "
                f"{splits[wrong[0]].features[column]} in the split {wrong[0]!r}."
            )
        tags = {name: table[column][:] for name, table in splits.items()}
        for name, rows in tags.items():
            for number, row in enumerate(rows):
                if any(tag is None or (isinstance(items[name], ClassLabel) and tag < 0) for tag in row or [None]):
                    raise ValueError(
                        f"Expected a tag for every word, got {row} in row {number} of the split {name!r}, column "
                        f"{column!r}."
                    )
        first = items[next(iter(splits))]
        if isinstance(first, ClassLabel):
            self._names, values = list(first.names), list(range(first.num_classes))
            if other := [name for name, item in items.items() if getattr(item, "names", None) != first.names]:
                raise ValueError(f"Expected the same tags in every split, got others in {other[0]!r} ({column!r}).")
        else:
            found = {tag for rows in tags.values() for row in rows for tag in row}
            if len({type(tag) for tag in found}) > 1:
                raise ValueError(f"Expected one type of tag in every split, got strings and integers in {column!r}.")
            values = sorted(found)
            self._names = [str(value) for value in values]
        number_of = {value: number for number, value in enumerate(values)}
        feature = List(ClassLabel(names=self._names))
        return DatasetDict(
            {
                name: with_labels(table, column, [[number_of[tag] for tag in row] for row in tags[name]], feature)
                for name, table in splits.items()
            }
        )

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        return len(self._names)

    @override
    def classes(self, splits: DatasetDict) -> list[str]:
        return self._names

    @override
    def sizes(self, num_outputs: int) -> dict[str, Any]:
        return {
            "num_classes": num_outputs, "task": "multiclass", "ignore_index": IGNORE_INDEX, "tags": self._names,
        }  # fmt: skip

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        accuracy = MulticlassAccuracy(num_outputs, average="micro", ignore_index=IGNORE_INDEX)
        if are_entity_tags(self._names):
            return {"entity_f1": EntityF1(self._names), "accuracy": accuracy}
        return {"accuracy": accuracy}

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the tokens that count (0 if none does): logits ``(…, tags)`` and labels ``(…)``."""
        logits, labels = logits.flatten(0, -2), labels.flatten()
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / max(1, self.count(labels))

    @override
    def class_logits(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return logits[labels != IGNORE_INDEX]

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities ``(samples, tags, tokens)`` and tags ``(samples, tokens)``."""
        return logits.softmax(-1).transpose(1, 2), labels

    @override
    def count(self, labels: Tensor) -> int:
        return int((labels != IGNORE_INDEX).sum())

    @override
    def check(self, splits: DatasetDict, dataset: str) -> None:
        seen = {name: {tag for row in table[LABELS][:] for tag in row} for name, table in splits.items()}
        if len(seen["train"]) < 2:
            found = ", ".join(self._names[tag] for tag in seen["train"]) or "none"
            raise ValueError(f"Expected two tags or more in the training split of {dataset!r}, found {found}.")
        for name, tags in seen.items():
            if unseen := sorted(tags - seen["train"]):
                raise ValueError(
                    f"Expected the tags of the training split in the split {name!r} of {dataset!r}, found "
                    f"{', '.join(repr(self._names[tag]) for tag in unseen)} too."
                )


def _are_tags(item: Any) -> bool:
    return getattr(item, "dtype", "nested").startswith(("int", "uint", "string", "large_string"))
