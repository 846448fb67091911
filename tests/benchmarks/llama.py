"""Kinds and shapes of Llama-3.1-8B's parameters, from its configuration alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_drm.deltas import Kind, backbone_parameters

NUM_VALUES = 8_030_261_248  # as its model card says
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def llama_parameters() -> tuple[dict[str, Kind], dict[str, tuple[int, ...]]]:
    """Kind and shape by name."""
    with torch.device("meta"):
        parameters = backbone_parameters(LlamaForCausalLM(LLAMA), [])
    assert sum(parameter.tensor.numel() for parameter in parameters.values()) == NUM_VALUES
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    return kinds, {name: tuple(parameter.tensor.shape) for name, parameter in parameters.items()}
