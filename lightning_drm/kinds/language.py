"""Texts, each predicted token by token (causal language models)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import Perplexity
from typing_extensions import override

from lightning_drm.kinds.kind import IGNORE_INDEX
from lightning_drm.kinds.text_metrics import TokenAccuracy
from lightning_drm.kinds.token_prediction import TokenPrediction


class Language(TokenPrediction):
    """Texts, each predicted token by token. The score is perplexity over all tokens that count; lower is better.

    The share of tokens that are the most likely ones is measured too. Labels are the input's tokens, with -100 for
    those that only serve as context; the place of a token is that of its label, and its prediction is one place before.

    Example:
        >>> kind = Language()
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])
        >>> kind.loss(logits, labels), kind.count(labels)
        (tensor(1.3863), 2)
    """

    auto_class: ClassVar[Mapping[str, str]] = {"text": "AutoModelForCausalLM"}

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        perplexity = Perplexity(ignore_index=IGNORE_INDEX).set_dtype(torch.float64)  # sums over millions of tokens
        return {"perplexity": perplexity, "token_accuracy": TokenAccuracy(IGNORE_INDEX)}

    @override
    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    @override
    def count(self, labels: Tensor) -> int:
        return super().count(labels[:, 1:])  # nothing predicts a first token

    @override
    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1], labels[:, 1:]
