"""A headless transformers encoder with a linear head, for backbones that are not used through theirs."""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput
from typing_extensions import override


class PooledClassifier(nn.Module):
    """Pools an encoder's last hidden states into one vector per sample, or takes each token's, for a linear head.

    Args:
        encoder: A transformers encoder whose output has ``last_hidden_state`` of shape ``(batch, tokens, dim)``.
        num_classes: Number of classes.
        pooling: ``"mean"`` over the tokens that the attention mask keeps (without one, all), ``"first"`` token, or the
            encoder's own ``"pooler"``; ``None`` for logits of every token.
        dropout: Probability of dropping an entry of the vector that the head sees.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> encoder = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> PooledClassifier(encoder, 3, "mean")(input_ids=torch.tensor([[1, 2], [3, 4]])).logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        num_classes: int,
        pooling: Literal["mean", "first", "pooler"] | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes, dtype=encoder.dtype)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Takes gradients from what is no part of this computation, for distributed training would wait for them."""
        pooler = getattr(self.encoder, "pooler", None)
        if self.pooling != "pooler" and isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    @override
    def forward(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits ``(batch, classes)``, or ``(batch, tokens, classes)`` without pooling, in transformers' class."""
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.encoder(**masks, **inputs)
        hidden = output.last_hidden_state
        if self.pooling == "pooler":
            hidden = self._pooled(output)
        elif self.pooling is not None:
            hidden = hidden[:, 0] if self.pooling == "first" else _masked_mean(hidden, attention_mask)
        return SequenceClassifierOutput(logits=cast(torch.FloatTensor, self.classifier(self.dropout(hidden))))

    def _pooled(self, output: ModelOutput) -> Tensor:
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{type(self.encoder).__name__} pools nothing by itself: choose another pooling.")
        return pooled


def _masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
