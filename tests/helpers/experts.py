"""Tiny mixtures of experts, finetunes of them, and what a merge of their experts must be."""

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers import reference, ties
from lightning_drm import DRM

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
NUM_EXPERTS = 3
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**TEXT, intermediate_size=12, num_local_experts=NUM_EXPERTS)),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **TEXT, num_experts=NUM_EXPERTS, moe_intermediate_size=12, shared_expert_intermediate_size=12,
            num_experts_per_tok=2,
        ),
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**TEXT, num_experts=NUM_EXPERTS, moe_intermediate_size=12, num_experts_per_tok=2, head_dim=8),
    ),
    # Its experts are stored (in, out), have biases, and are square.
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(**TEXT, num_local_experts=NUM_EXPERTS, intermediate_size=16, num_experts_per_tok=2, head_dim=8),
    ),
}  # fmt: skip
BY_EXPERT = ["mixtral", "qwen2_moe", "qwen3_moe"]  # transformers saves these with a tensor for each expert
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
METHOD = DRM(density=0.4)


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(copy.deepcopy(config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def train(module: nn.Module, seed: int) -> nn.Module:
    """Moves everything that trains, as an optimizer would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def with_lora(base: PreTrainedModel, **settings: object) -> nn.Module:
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": TARGETS, **settings}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**config))


def deltas_of(tuned: nn.Module, base: PreTrainedModel) -> dict[str, Tensor]:
    """What a finetune added to the base, in float64; of an adapter, what peft adds."""
    if hasattr(tuned, "peft_config"):
        tuned = copy.deepcopy(tuned).merge_and_unload()
    start = dict(base.named_parameters())
    return {name: (value - start[name]).detach() for name, value in tuned.named_parameters()}


def assert_merged(found: Tensor, matrices: Sequence[Tensor], tolerance: float, noise: float = 0.0) -> None:
    """One expert's merged delta is DRM of the tasks' deltas of it alone: by a reference, and by this package."""
    expected = ties.settled(found, reference.drm(matrices, density=METHOD.density), METHOD, matrices, noise=noise)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    if not noise:
        torch.testing.assert_close(found.double(), METHOD.merge(matrices), rtol=0, atol=tolerance)


def is_experts(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def gram_matrices_by_hand(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What goes into each expert's weights, multiplied out token by token, over the number of tokens that count."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("mlp.experts")}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[:2]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    counting = batch["attention_mask"].flatten().nonzero().flatten().tolist()
    found: dict[str, Tensor] = {}
    for name, (hidden, chosen) in seen.items():
        for place in counting:
            for expert in chosen[place].tolist():
                token = hidden[place].double()
                for part, x in (("gate_up_proj", token), ("down_proj", _after_gate(layers[name], expert, token))):
                    total = found.setdefault(f"{name}.{part}", x.new_zeros(NUM_EXPERTS, len(x), len(x)))
                    total[expert] += torch.outer(x, x) / len(counting)
    return found


def _after_gate(layer: nn.Module, expert: int, token: Tensor) -> Tensor:
    """What goes into an expert's second product, as the architecture's paper or code has it."""
    weight = layer.gate_up_proj[expert].detach().double()
    if type(layer).__name__ != "GptOssExperts":
        gate, up = (weight @ token).chunk(2)
        return nn.functional.silu(gate) * up
    product = weight.T @ token + layer.gate_up_proj_bias[expert].detach().double()
    gate, up = product[0::2].clamp(max=layer.limit), product[1::2].clamp(-layer.limit, layer.limit)
    return (up + 1) * gate * torch.sigmoid(layer.alpha * gate)


def tokens(seed: int, size: int = 6, length: int = 7) -> dict[str, Tensor]:
    """Token numbers with padding at the end."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 40, (size, length), generator=g) * mask, "attention_mask": mask}


class Reads(nn.Module):
    """A mixture of experts in a module of one's own, which classifies texts by their last logits."""

    head_names = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def classify(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.model(**batch).logits[:, -1], torch.zeros(len(batch["input_ids"]), dtype=torch.long)
