"""LoRA deltas against the weights that peft itself merges, and the adapters that must be refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertModel, GPT2Config, GPT2Model

from helpers.devices import CPU
from lightning_drm.deltas import Base, TaskVector, remove_wrappers
from lightning_drm.merging import LowRank

LINEAR = ["query", "value"]


class WithHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(16, 3)


def bert(network: BertModel) -> nn.Module:
    return network


def gpt2(_: BertModel) -> nn.Module:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=23, n_positions=12, n_embd=16, n_layer=2, n_head=2))


def cnn(_: BertModel) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, (1, 3)))


CASES: dict[str, tuple[Callable[[BertModel], nn.Module], LoraConfig]] = {
    "plain": (bert, LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR)),
    "alpha_is_not_r": (bert, LoraConfig(r=4, lora_alpha=7, target_modules=LINEAR)),
    "rslora": (bert, LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=LINEAR)),
    "patterns": (
        bert,
        LoraConfig(
            r=4, lora_alpha=7, target_modules=LINEAR,
            rank_pattern={"layer.0.attention.self.query": 2}, alpha_pattern={"layer.1.attention.self.value": 3},
        ),
    ),
    "patterns_and_rslora": (
        bert,
        LoraConfig(
            r=4, lora_alpha=7, use_rslora=True, target_modules=LINEAR,
            rank_pattern={"query": 3}, alpha_pattern={"query": 5},
        ),
    ),
    "all_linear": (bert, LoraConfig(r=2, target_modules="all-linear")),
    "dropout": (bert, LoraConfig(r=2, lora_dropout=0.5, target_modules=LINEAR)),
    "rank_one": (bert, LoraConfig(r=1, target_modules=["dense"])),
    "conv1d": (gpt2, LoraConfig(r=3, lora_alpha=5, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"])),
    "conv1d_rank_one": (gpt2, LoraConfig(r=1, fan_in_fan_out=True, target_modules=["c_attn"])),
    "embedding": (bert, LoraConfig(r=3, lora_alpha=5, target_modules=["word_embeddings", "query"])),
    "conv2d": (cnn, LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["0", "2", "3"])),
    "bias_all": (bert, LoraConfig(r=2, bias="all", target_modules=LINEAR)),
    "bias_lora_only": (bert, LoraConfig(r=2, bias="lora_only", target_modules=LINEAR)),
    "modules_to_save": (bert, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["pooler", "LayerNorm"])),
    "gaussian": (bert, LoraConfig(r=2, init_lora_weights="gaussian", target_modules=LINEAR)),
    "orthogonal": (bert, LoraConfig(r=2, init_lora_weights="orthogonal", target_modules=LINEAR)),
}  # fmt: skip


def train(module: nn.Module, seed: int = 1) -> None:
    """Moves everything that trains, as an optimizer would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def collect(module: nn.Module, device: torch.device = CPU) -> TaskVector:
    base = Base()
    module.to(device)
    base.remember(module, ["head"], "task")
    train(module)
    return base.task_vector(module, ["head"], "task")


def dense(delta: Tensor | LowRank) -> Tensor:
    return delta.up.double() @ delta.down.double() if isinstance(delta, LowRank) else delta.double()


def assert_adds(vector: TaskVector, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every parameter of `after` is that of `before` plus its delta, to 1e-6 of the delta."""
    changed = {name for name in before if not torch.equal(before[name].double(), after[name].double().cpu())}
    assert changed, "the finetune must have changed something"
    assert changed <= set(vector.deltas)
    for name in vector.deltas:
        expected = after[name].double().cpu() - before[name].double()
        error = (dense(vector.deltas[name]).cpu() - expected).norm() / expected.norm()
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_delta_is_what_peft_merges(bert: BertModel, case: str, device: torch.device) -> None:
    build, config = CASES[case]
    plain = build(bert)
    before = {f"model.{name}": tensor.clone() for name, tensor in plain.state_dict().items()}
    wrapped = WithHead(get_peft_model(plain, copy.deepcopy(config)))
    vector = collect(wrapped, device)
    merged = copy.deepcopy(wrapped.model).double().merge_and_unload()
    assert_adds(vector, before, {f"model.{name}": tensor for name, tensor in merged.state_dict().items()})


@pytest.mark.parametrize("case", [case for case in CASES if case != "modules_to_save"])
def test_delta_of_injected_adapters(bert: BertModel, case: str, device: torch.device) -> None:
    build, config = CASES[case]
    plain = build(bert)
    before = {f"model.{name}": tensor.clone() for name, tensor in plain.state_dict().items()}
    module = WithHead(inject_adapter_in_model(copy.deepcopy(config), plain))
    vector = collect(module, device)
    merged = copy.deepcopy(module.model).double()
    for layer in list(merged.modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
    after = {
        f"model.{name.replace('.base_layer', '')}": tensor
        for name, tensor in merged.state_dict().items()
        if "lora_" not in name
    }
    assert_adds(vector, before, after)


def test_linear_layers_stay_factors(bert: BertModel) -> None:
    vector = collect(WithHead(get_peft_model(bert, LoraConfig(r=3, target_modules=[*LINEAR, "word_embeddings"]))))
    assert {type(delta) for delta in vector.deltas.values()} == {LowRank}
    assert {delta.rank for delta in vector.deltas.values() if isinstance(delta, LowRank)} == {3}
    assert vector.kinds["model.embeddings.word_embeddings.weight"] == "embedding"
    assert vector.kinds["model.encoder.layer.0.attention.self.query.weight"] == "matrix"


def test_half_precision_adapters_give_float32_factors(bert: BertModel) -> None:
    module = WithHead(get_peft_model(bert.bfloat16(), LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR)))
    module = module.bfloat16()
    vector = collect(module)
    layer = module.model.base_model.model.encoder.layer[0].attention.self.query
    delta = vector.deltas["model.encoder.layer.0.attention.self.query.weight"]
    assert isinstance(delta, LowRank)
    assert delta.dtype == torch.float32
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(dense(delta), b @ a * (5 / 3), rtol=0, atol=1e-6 * float((b @ a).abs().max()))


def test_vector_is_independent_of_the_module(bert: BertModel) -> None:
    module = WithHead(get_peft_model(bert, LoraConfig(r=2, bias="all", target_modules=LINEAR)))
    vector = collect(module)
    deltas = {name: dense(delta).clone() for name, delta in vector.deltas.items()}
    head = {name: tensor.clone() for name, tensor in vector.head.items()}
    train(module, seed=2)
    for name, delta in vector.deltas.items():
        assert torch.equal(dense(delta), deltas[name])
    for name, tensor in vector.head.items():
        assert torch.equal(tensor, head[name])


@pytest.mark.parametrize("inject", [False, True])
def test_adapters_are_removed_with_names_restored(bert: BertModel, inject: bool) -> None:
    names = list(WithHead(bert).state_dict())
    config = LoraConfig(r=2, target_modules=LINEAR)
    model = inject_adapter_in_model(config, bert) if inject else get_peft_model(bert, config)
    module = WithHead(model)
    remove_wrappers(module)
    assert list(module.state_dict()) == names
    assert not any(hasattr(child, "peft_config") for child in module.modules())
    module.model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_saved_modules_keep_their_finetuned_copy(bert: BertModel) -> None:
    module = WithHead(get_peft_model(bert, LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["pooler"])))
    train(module)
    trained = module.model.base_model.model.pooler.modules_to_save["default"].dense.weight.clone()
    remove_wrappers(module)
    assert torch.equal(module.model.pooler.dense.weight, trained)


def lora(**arguments: object) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": LINEAR, **arguments}))


def two_active(model: nn.Module) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR))
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=LINEAR))
    wrapped.base_model.set_adapter(["default", "second"])
    return wrapped


def merged_already(model: nn.Module) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR))
    wrapped.merge_adapter()
    return wrapped


def disabled(model: nn.Module) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR))
    wrapped.base_model.disable_adapter_layers()
    return wrapped


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "dora": (lora(use_dora=True), "(?i)query: .*dora"),
    "pissa": (lora(init_lora_weights="pissa"), "'pissa' changes the base"),
    "pissa_fast": (lora(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes the base"),
    "olora": (lora(init_lora_weights="olora"), "'olora' changes the base"),
    "lora_bias": (lora(lora_bias=True), "query: lora_bias"),
    "token_indices": (lora(trainable_token_indices={"word_embeddings": [1]}), "word_embeddings: .*trainable_token"),
    "ia3": (lambda model: get_peft_model(model, IA3Config(target_modules=LINEAR, feedforward_modules=[])), "IA3"),
    "loha": (lambda model: get_peft_model(model, LoHaConfig(r=2, target_modules=LINEAR)), "LOHA"),
    "adalora": (
        lambda model: get_peft_model(model, AdaLoraConfig(init_r=2, target_modules=LINEAR, total_step=10)),
        "ADALORA",
    ),
    "trainable_tokens": (
        lambda model: get_peft_model(model, TrainableTokensConfig(target_modules=["word_embeddings"])),
        "TRAINABLE_TOKENS",
    ),
    "prompt_tuning": (
        lambda model: get_peft_model(model, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)),
        "PROMPT_TUNING",
    ),
    "two_active": (two_active, "query: expected one active LoRA adapter, got 2: default, second"),
    "merged": (merged_already, "query: .*already merged"),
    "disabled": (disabled, "query: .*disabled"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_inexact_adapters_are_refused_before_training(bert: BertModel, case: str) -> None:
    build, message = REFUSED[case]
    module = WithHead(build(bert))
    with pytest.raises(ValueError, match=message):
        Base().remember(module, ["head"], "task")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_injected_initialisations_that_move_the_base_are_refused(bert: BertModel, init: str) -> None:
    module = WithHead(inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=init, target_modules=LINEAR), bert))
    with pytest.raises(ValueError, match=f"'{init}' changes the base"):
        Base().remember(module, ["head"], "task")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)


def test_adapters_around_several_parameters_are_refused() -> None:
    """Their deltas would be lost: the weight that they adapt is not the layer's `weight`."""
    module = WithHead(get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"])))
    with pytest.raises(ValueError, match="attention: LoRA around a MultiheadAttention"):
        Base().remember(module, ["head"], "task")


def test_every_refused_layer_is_named_at_once(bert: BertModel) -> None:
    with pytest.raises(ValueError, match="lora_bias") as error:
        Base().remember(WithHead(lora(lora_bias=True)(bert)), ["head"], "task")
    assert [f"layer.{layer}.attention.self.{name}: " in str(error.value) for layer in (0, 1) for name in LINEAR] == [
        True
    ] * 4


def test_adapters_in_the_head_are_refused_before_training(bert: BertModel) -> None:
    module = get_peft_model(WithHead(bert), LoraConfig(r=2, target_modules=["head", "query"]))
    with pytest.raises(ValueError, match=r"head\.weight: .*no LoRA adapter"):
        Base().remember(module, ["head"], "task")
