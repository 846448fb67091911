"""What parameters of real models are: experts, kernels, output embeddings and heads."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from helpers import experts
from lightning_drm.deltas import backbone_parameters, guess_kind

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(2, 2)


def kinds_of(module: nn.Module, head: tuple[str, ...] = ()) -> dict[str, str]:
    return {name: parameter.kind for name, parameter in backbone_parameters(module, head).items()}


@pytest.mark.parametrize("name", experts.MODELS)
def test_fused_experts(name: str) -> None:
    model = experts.base_model(name)
    kinds = kinds_of(model)
    stacks = {key for key, kind in kinds.items() if kind == "experts"}
    assert stacks == {key for key, value in model.named_parameters() if value.ndim == 3}
    assert len(stacks) == 4
    router = "router" if name == "gpt_oss" else "gate"
    assert kinds[f"model.layers.0.mlp.{router}.weight"] == "matrix"
    assert {kinds[key] for key in kinds if key.endswith("_bias")} <= {"other"}


def test_other_weights_of_three_dimensions_are_no_experts() -> None:
    vit = ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
        )
    )
    module = nn.ModuleDict({"vit": vit, "conv": nn.Conv1d(4, 3, 5), "up": nn.ConvTranspose1d(4, 3, 2)})
    kinds = kinds_of(module)
    assert kinds["conv.weight"] == kinds["up.weight"] == "convolution"
    assert kinds["vit.embeddings.patch_embeddings.projection.weight"] == "convolution"
    assert kinds["vit.embeddings.cls_token"] == kinds["vit.embeddings.position_embeddings"] == "other"
    assert "experts" not in kinds.values()


def test_a_layer_that_counts_its_experts() -> None:
    layer = nn.Module()
    layer.num_experts = 4
    layer.weight = nn.Parameter(torch.zeros(4, 3, 2))
    layer.shared = nn.Parameter(torch.zeros(1, 3, 2))
    assert kinds_of(layer) == {"weight": "experts", "shared": "other"}


def t5(tied: bool) -> PreTrainedModel:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.tie_word_embeddings = tied
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("model", [LlamaForCausalLM(LlamaConfig(**LLAMA)), t5(tied=False)], ids=["llama", "t5"])
@pytest.mark.parametrize("wrapped", ["plain", "held", "peft", "lora on it", "saved with it"])
def test_untied_output_embeddings(model: PreTrainedModel, wrapped: str) -> None:
    module, prefix = copy.deepcopy(model), ""
    if wrapped == "held":
        module, prefix = Holder(module), "model."
    elif wrapped != "plain":
        targets = ["lm_head"] if wrapped == "lora on it" else ["k_proj", "k"]
        saved = ["lm_head"] if wrapped == "saved with it" else None
        module = get_peft_model(module, LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    parameters = backbone_parameters(module, ["head"] if wrapped == "held" else [])
    outputs = {name for name, parameter in parameters.items() if parameter.kind == "output_embedding"}
    assert outputs == {f"{prefix}lm_head.weight"}
    assert (parameters[f"{prefix}lm_head.weight"].adapter is not None) == (wrapped == "lora on it")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), "model.embed_tokens.weight"),
        (t5(tied=True), "shared.weight"),
        (
            BertForMaskedLM(
                BertConfig(
                    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
                )
            ),
            "bert.embeddings.word_embeddings.weight",
        ),
    ],
    ids=["llama", "t5", "bert"],
)
def test_tied_output_embeddings_are_the_input_embeddings(model: PreTrainedModel, name: str) -> None:
    kinds = kinds_of(model)
    assert kinds[name] == "embedding"
    assert "output_embedding" not in kinds.values()


def test_a_classification_head_that_is_merged_is_a_matrix() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=40))
    assert kinds_of(model)["score.weight"] == "matrix"
    assert kinds_of(Holder(model))["head.weight"] == "matrix"


def test_kinds_by_name_and_shape() -> None:
    expected = {
        ("model.layers.0.mlp.experts.down_proj", (4, 3, 2)): "experts",
        ("model.layers.0.mlp.experts.down_proj_bias", (4, 3)): "other",
        ("model.layers.0.mlp.experts.1.w1.weight", (3, 2)): "matrix",
        ("conv.weight", (4, 3, 2)): "convolution",
        ("experts.weight", (4, 3, 2, 2)): "convolution",
        ("embeddings.cls_token", (1, 1, 8)): "other",
        ("model.lm_head.weight", (9, 4)): "output_embedding",
        ("lm_head.bias", (9,)): "other",
    }
    assert {key: guess_kind(*key) for key in expected} == expected
