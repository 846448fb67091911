"""LoRA on experts: the delta is what peft adds, as factors of each expert."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from helpers import experts
from helpers.devices import CPU
from lightning_drm.deltas import load_task_vector, remove_wrappers, save_task_vector
from lightning_drm.deltas.collect import Base
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.merging import LowRankStack
from lightning_drm.merging.low_rank import densify

SETTINGS = [
    {},
    {"use_rslora": True, "rank_pattern": {".*down_proj": 3}, "alpha_pattern": {".*gate_up_proj": 7}},
    {"target_parameters": ["mlp.experts.down_proj"]},
    {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]},
]


def collect(module: nn.Module, device: torch.device = CPU) -> TaskVector:
    base = Base()
    module.to(device)
    base.remember(module, [], "task")
    experts.train(module, 1)
    return base.task_vector(module, [], "task")


def assert_added(vector: TaskVector, expected: dict[str, Tensor]) -> None:
    """Every delta is the expected one, to the precision of float32 factors; all others are zero."""
    assert {name for name, value in expected.items() if value.any()} == set(vector.deltas)
    for name, delta in vector.deltas.items():
        torch.testing.assert_close(densify(delta).double().cpu(), expected[name].cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", experts.MODELS)
def test_delta_is_what_peft_merges(name: str, settings: dict[str, object], device: torch.device) -> None:
    base = experts.base_model(name).to(device)
    module = experts.with_lora(base, **settings)
    vector = collect(module, device)
    stacks = {key: delta for key, delta in vector.deltas.items() if experts.is_experts(key)}
    assert all(isinstance(delta, LowRankStack) for delta in stacks.values())
    assert len(stacks) == 2 * len(settings.get("target_parameters", experts.TARGETS))
    assert {vector.kinds[key] for key in stacks} == {"experts"}
    assert_added(vector, experts.deltas_of(module, base))
    remove_wrappers(module)
    after = dict(module.base_model.model.named_parameters())
    assert after.keys() == dict(base.named_parameters()).keys()


def test_old_names_of_targets() -> None:
    """peft turns those of transformers 4 into parameters, and doubles the rank of what was fused."""
    base = experts.base_model("mixtral")
    module = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3", "q_proj"])
    )
    vector = collect(module)
    ranks = {key: delta.rank for key, delta in vector.deltas.items() if "layers.0.mlp" in key}
    assert ranks == {"model.layers.0.mlp.experts.gate_up_proj": 4, "model.layers.0.mlp.experts.down_proj": 2}
    assert_added(vector, experts.deltas_of(module, base))


def test_stored_factors(tmp_path: Path) -> None:
    vector = collect(experts.with_lora(experts.base_model("qwen3_moe")))
    save_task_vector(vector, tmp_path)
    loaded = load_task_vector(tmp_path)
    assert loaded.kinds == vector.kinds
    for name, delta in vector.deltas.items():
        assert type(loaded.deltas[name]) is type(delta)
        assert torch.equal(loaded.deltas[name].up, delta.up)
        assert torch.equal(loaded.deltas[name].down, delta.down)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.read(name, slice(1, 3)).dense(), vector.deltas[name].dense()[1:3])


class Plain(nn.Module):
    """Parameters that are no layer's weight: a stack of matrices, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(3, 8, 6, dtype=torch.float64))
        self.experts.matrix = nn.Parameter(torch.randn(4, 7, dtype=torch.float64))
        self.dense = nn.Linear(6, 6).double()


def test_parameters_of_any_module() -> None:
    torch.manual_seed(0)
    plain = Plain()
    targets = ["experts.weights", "experts.matrix"]
    module = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["dense"], target_parameters=targets), copy.deepcopy(plain)
    )
    vector = collect(module)
    expected = {}
    for name, value in plain.named_parameters():
        expected[name] = torch.zeros_like(value)
    wrapper = module.experts
    for layer in (wrapper, wrapper.base_layer):
        expected[f"experts.{layer.parameter_name}"] = layer.get_delta_weight("default").detach()
    expected["dense.weight"] = module.dense.get_delta_weight("default").detach()
    assert_added(vector, expected)


def test_a_single_expert_that_peft_would_turn_is_refused() -> None:
    plain = Plain()
    plain.experts = nn.Module()
    plain.experts.is_transposed, plain.experts.num_experts = True, 1
    plain.experts.weights = nn.Parameter(torch.randn(1, 8, 6))
    module = get_peft_model(plain, LoraConfig(r=2, target_modules=["dense"], target_parameters=["experts.weights"]))
    with pytest.raises(ValueError, match=r"experts: peft adds the transposed product .* weights has no exact delta"):
        Base().remember(module, [], "task")
