"""What kinds of task have in common in which a language model predicts the tokens of a text."""

from typing import Any, ClassVar

from datasets import DatasetDict
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_drm.kinds.columns import require_texts
from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS, Kind


class TokenPrediction(Kind):
    """A text per sample, of which a language model predicts each token from those before it.

    All of the model is merged: no task has a head of its own. Tokens count alike, whatever text they are of.
    """

    shares_head: ClassVar[bool] = True
    by_tokens: ClassVar[bool] = True

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        for name, table in splits.items():
            require_texts(table, column, f"the split {name!r}")
        return splits if column == LABELS else splits.rename_column(column, LABELS)

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        return 0

    @override
    def model_settings(self, num_outputs: int) -> dict[str, Any]:
        return {}

    @override
    def sizes(self, num_outputs: int) -> dict[str, Any]:
        return {"ignore_index": IGNORE_INDEX}

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the tokens that count; 0 if none does."""
        scores, target = self.aligned(logits, labels)
        total = functional.cross_entropy(
            scores.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total / max(1, self.count(labels))

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.aligned(logits, labels)

    @override
    def count(self, labels: Tensor) -> int:
        return int((labels != IGNORE_INDEX).sum())

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the tokens that they predict, place by place.

        Args:
            logits: ``(batch, tokens, vocabulary)``.
            labels: ``(batch, tokens)``, with `IGNORE_INDEX` where nothing counts.
        """
        return logits, labels
