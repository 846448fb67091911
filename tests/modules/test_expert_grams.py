"""Gram matrices of the inputs of experts, against loops over tokens with each architecture's own formula.

Models compute in float32, as transformers' default way of computing experts takes no doubles.
"""

import copy

import pytest
import torch
from torch import nn

from helpers import experts
from lightning_drm.modules import gram_matrices

LAYERS = [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")]


def collected(model: nn.Module, batches: list, **options: object) -> dict[str, torch.Tensor]:
    module = experts.Reads(model)
    names = {f"model.{name}" for name in LAYERS}
    matrices, leaders = gram_matrices(module, (), names, batches, **options)
    assert leaders == {name: name for name in names}, "each weight has inputs of its own"
    return {name.removeprefix("model."): matrix for name, matrix in matrices.items()}


@pytest.mark.parametrize("name", experts.MODELS)
def test_each_expert_has_the_gram_matrix_of_its_inputs(name: str) -> None:
    model, batch = experts.base_model(name).float(), experts.tokens(0)
    found, expected = collected(model, [batch]), experts.gram_matrices_by_hand(model, batch)
    assert found.keys() == expected.keys() == set(LAYERS)
    for weight, matrices in expected.items():
        torch.testing.assert_close(found[weight].double(), matrices, rtol=1e-5, atol=1e-6)
        assert len({float(matrix.trace()) for matrix in matrices}) > 1, "the case tells experts apart"


def test_batches_passes_and_padding() -> None:
    model, batches = experts.base_model("mixtral").float(), [experts.tokens(seed) for seed in (0, 1)]
    found = collected(model, batches)
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    assert counts[0] != counts[1]
    alone = [experts.gram_matrices_by_hand(model, batch) for batch in batches]
    for name, matrices in collected(model, batches, max_bytes=1).items():
        assert torch.equal(matrices, found[name]), "one weight at a time"
        expected = sum(count * grams[name] for count, grams in zip(counts, alone, strict=True)) / sum(counts)
        torch.testing.assert_close(matrices.double(), expected, rtol=1e-5, atol=1e-6)
    everything = {**batches[0], "attention_mask": torch.ones_like(batches[0]["attention_mask"])}
    with_padding = collected(model, [everything])
    for name, matrices in experts.gram_matrices_by_hand(model, everything).items():
        torch.testing.assert_close(with_padding[name].double(), matrices, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_under_adapters_inputs_are_those_of_the_adapted_model(name: str) -> None:
    adapted = experts.train(experts.with_lora(experts.base_model(name).float()), 1)
    batch = experts.tokens(0)
    found = collected(adapted, [batch])
    merged = copy.deepcopy(adapted).merge_and_unload()
    for weight, matrices in experts.gram_matrices_by_hand(merged, batch).items():
        torch.testing.assert_close(found[weight].double(), matrices, rtol=1e-5, atol=1e-6)
