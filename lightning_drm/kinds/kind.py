"""What a kind of task is: all that differs between classifying, rating, tagging or writing, in one object.

A data module says which kind its task is; `TransformerTask` asks it for everything that depends on that. A new kind is
a file with one subclass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import DatasetDict
from torch import Tensor, nn
from torchmetrics import Metric

LABELS = "labels"
"""The column, and the field of a batch, that holds what is to be predicted; named as transformers expects it."""

IGNORE_INDEX = -100
"""The label that losses and metrics leave out (PyTorch's and transformers' convention)."""


class Kind(ABC):
    """One kind of task.

    Attributes:
        auto_class: By modality (``"text"``, ``"image"``), the name of transformers' class for this kind, of which a
            backbone is loaded with its own head.
        pools: Whether a linear head on an encoder sees one vector per sample; otherwise, one per token.
        shares_head: Whether there is no head of a task's own, as all of the model is merged (language models).
        several_vectors: Whether the head sees several vectors for one label, which `loss` puts together (choices).
        by_tokens: Whether the loss is a mean over tokens, whose number differs between batches of the same size.
    """

    auto_class: ClassVar[Mapping[str, str]]
    pools: ClassVar[bool] = True
    shares_head: ClassVar[bool] = False
    by_tokens: ClassVar[bool] = False
    several_vectors: ClassVar[bool] = False

    @abstractmethod
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        """Makes ``labels`` of a column as it was found, alike in every split.

        Args:
            splits: The tables.
            column: The column.

        Raises:
            ValueError: If the column holds something else than this kind predicts.
        """

    @abstractmethod
    def num_outputs(self, splits: DatasetDict) -> int:
        """How many numbers the head gives per sample, from tables that `encode` made; 0 where there is no head."""

    @abstractmethod
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        """What is measured unless the task says otherwise, by name; the first is the score."""

    def sizes(self, num_outputs: int) -> dict[str, Any]:
        """Arguments of torchmetrics' classes that the data know: they are filled in where a user leaves them out."""
        return {}

    def check(self, splits: DatasetDict, dataset: str) -> None:
        """Refuses labels that training cannot teach: here, none at all.

        Args:
            splits: Tables that `encode` made.
            dataset: Their name, for messages.

        Raises:
            ValueError: If there are such labels.
        """
        if not len(splits["train"]):
            raise ValueError(f"Expected rows in the training split of {dataset!r}, found none.")

    def classes(self, splits: DatasetDict) -> list[str] | None:
        """The names of the classes, in the order of their numbers; ``None`` for kinds that have none."""
        return None

    def strata(self, labels: Any) -> Any:
        """A class per sample, of which each part of a split gets its share; ``None`` where any rows will do.

        Args:
            labels: The column `labels`.
        """
        return None

    def model_settings(self, num_outputs: int) -> dict[str, Any]:
        """Settings of transformers' model of `auto_class`."""
        return {"num_labels": num_outputs}

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model reads of a batch.

        Args:
            model: The model with its head.
            batch: Inputs and labels.
        """
        return {name: value for name, value in batch.items() if name != LABELS}

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The outputs of which `loss` and `prediction` make something.

        Args:
            model: The model with its head.
            inputs: What `inputs` returned.
        """
        logits: Tensor = model(**inputs).logits
        return logits

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over all that counts.

        Args:
            logits: What `logits` returned, in float32.
            labels: The batch's labels.
        """

    @abstractmethod
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Any, Any]:
        """Predictions and targets as torchmetrics' classes for this kind take them, samples first.

        Args:
            logits: What `logits` returned, in float32.
            labels: The batch's labels.
        """

    def class_logits(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Logits ``(…, classes)`` whose softmax says how likely each class is; ``None`` for kinds without classes.

        Args:
            logits: What `logits` returned, in float32.
            labels: The batch's labels. Of these, only which places count is looked at, and how many samples there are.
        """
        return None

    def generate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Any, Any] | None:
        """Predictions and targets of a batch, where a model makes them in its own way; ``None`` where logits do.

        Args:
            model: The model with its head.
            batch: Inputs and labels.
        """
        return None

    def count(self, labels: Tensor) -> int:
        """How much of a batch `loss` is the mean of: samples, or tokens."""
        return len(labels)
