"""A small pretrained model per test, always with the same weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel


class TwoLayers(nn.Module):
    """A backbone of every kind of parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dense = nn.Linear(6, 5)
        self.conv = nn.Conv1d(5, 4, 1)
        self.token = nn.Parameter(torch.randn(1, 6))
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.dense(self.norm(self.embed(ids)) + self.token)
        return self.head(self.conv(hidden[..., None]).squeeze(-1).relu())


@pytest.fixture
def network() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=12,
        )
    ).train()  # fmt: skip
