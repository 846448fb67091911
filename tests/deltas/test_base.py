"""Taking task vectors from full finetunes, and proving that all tasks started from one base."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel

from lightning_drm.deltas import Base, fingerprint, hash_tensor
from lightning_drm.deltas.fingerprint import describe_difference
from lightning_drm.merging import LowRank

HEAD = ["head"]


def train(module: nn.Module, size: float = 0.1) -> None:
    """Some real steps, so that batch norm's statistics move as well."""
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=size)
    for seed in range(3):
        ids = torch.randint(0, 7, (9,), generator=torch.Generator().manual_seed(seed))
        module(ids.to(next(module.parameters()).device)).square().sum().backward()
        optimizer.step()


def plain_difference(after: nn.Module, before: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return after.state_dict()[name].double() - before[name].double()


def test_dense_deltas_are_exact(network: nn.Module, device: torch.device) -> None:
    network.to(device)
    before = copy.deepcopy(network.state_dict())
    base = Base()
    base.remember(network, HEAD, "a")
    train(network)
    vector = base.task_vector(network, HEAD, "a", {"lr": 0.1})
    floating = [name for name, tensor in before.items() if tensor.is_floating_point() and not name.startswith("head")]
    assert list(vector.deltas) == floating
    for name, delta in vector.deltas.items():
        expected = plain_difference(network, before, name)
        assert delta.dtype == torch.float32
        assert expected.abs().max() > 0
        # One float32 subtraction: nothing but its own rounding may be between.
        torch.testing.assert_close(delta.double(), expected, rtol=2**-24, atol=0)
    assert vector.settings == {"lr": 0.1}
    assert vector.kinds.keys() == vector.deltas.keys()
    assert vector.base_hashes == {name: hash_tensor(before[name]) for name in floating}
    assert {name: tensor.tolist() for name, tensor in vector.head.items()} == {
        "head.weight": network.head.weight.tolist(),
        "head.bias": network.head.bias.tolist(),
    }


def test_double_precision_is_kept(network: nn.Module, device: torch.device) -> None:
    network.double().to(device)
    before = copy.deepcopy(network.state_dict())
    base = Base()
    base.remember(network, HEAD, "a")
    train(network, 1e-9)
    delta = base.task_vector(network, HEAD, "a").deltas["dense.weight"]
    assert delta.dtype == torch.float64
    assert torch.equal(delta, plain_difference(network, before, "dense.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_subtracted_in_float32(
    network: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    network.to(device, dtype)
    base = Base()
    base.remember(network, HEAD, "a")
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        # Half precision holds both ends of the first, but not their difference; the second is the smallest of steps.
        network.dense.weight.fill_(1 + torch.finfo(dtype).eps)
        network.dense.bias.mul_(1 + 4 * torch.finfo(dtype).eps)
    deltas = base.task_vector(network, HEAD, "a").deltas
    for name in ("dense.weight", "dense.bias"):
        assert deltas[name].dtype == torch.float32
        assert torch.equal(deltas[name].double(), plain_difference(network, before, name))
    in_half = network.dense.weight - before["dense.weight"]
    assert not torch.equal(in_half.double(), deltas["dense.weight"].double()), "the case shows no difference"


def test_vector_and_base_are_independent_of_the_module(network: nn.Module, device: torch.device) -> None:
    network.to(device)
    before = copy.deepcopy(network.state_dict())
    base = Base()
    base.remember(network, HEAD, "a")
    train(network)
    vector = base.task_vector(network, HEAD, "a")
    delta, head = vector.deltas["dense.weight"].clone(), vector.head["head.weight"].clone()
    train(network)
    assert torch.equal(vector.deltas["dense.weight"], delta)
    assert torch.equal(vector.head["head.weight"], head)
    tensors = base.tensors(network, HEAD)
    assert list(tensors) == list(vector.deltas)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.cpu(), before[name].cpu())


def test_frozen_parameters_have_no_delta(network: nn.Module) -> None:
    network.embed.requires_grad_(False)
    base = Base()
    base.remember(network, HEAD, "a")
    train(network)
    vector = base.task_vector(network, HEAD, "a")
    assert "embed.weight" not in vector.deltas
    assert "embed.weight" in vector.base_hashes
    assert torch.equal(base.tensors(network, HEAD)["embed.weight"], network.embed.weight)


def test_constant_buffers_may_hold_infinity(network: nn.Module) -> None:
    """A causal mask that checkpoints hold: infinity minus infinity is no delta, but nothing has changed either."""
    network.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    base = Base()
    base.remember(network, HEAD, "a")
    train(network)
    vector = base.task_vector(network, HEAD, "a")
    assert "mask" not in vector.deltas
    assert "norm.running_mean" in vector.deltas
    network.mask.zero_()
    with pytest.raises(ValueError, match="the delta of mask has NaN or infinite values"):
        base.task_vector(network, HEAD, "a")


def test_different_base_is_refused_by_task_and_parameter(network: nn.Module) -> None:
    base = Base()
    base.remember(network, HEAD, "first")
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.conv.weight[0, 0] += 1e-6
    with pytest.raises(
        ValueError, match=r"'second' starts from another base than task 'first': 1 differing values \(conv\.weight\)"
    ):
        base.remember(other, HEAD, "second")


def test_other_precision_or_vocabulary_is_another_base(network: nn.Module) -> None:
    base = Base()
    base.remember(network, HEAD, "first")
    with pytest.raises(ValueError, match=r"10 differing values \(conv\.bias, conv\.weight, dense\.bias, …\)"):
        base.remember(copy.deepcopy(network).bfloat16(), HEAD, "second")
    larger = copy.deepcopy(network)
    larger.embed = nn.Embedding.from_pretrained(torch.cat([network.embed.weight, torch.zeros(1, 6)]), freeze=False)
    with pytest.raises(ValueError, match=r"1 differing values \(embed\.weight\)"):
        base.remember(larger, HEAD, "second")


def test_missing_and_unknown_parameters_are_another_base(network: nn.Module) -> None:
    base = Base()
    base.remember(network, HEAD, "first")
    other = copy.deepcopy(network)
    other.conv.register_parameter("bias", None)
    other.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"1 missing \(conv\.bias\); 1 unknown \(extra\.weight\)"):
        base.remember(other, HEAD, "second")


def test_head_may_differ_between_tasks(network: nn.Module) -> None:
    base = Base()
    base.remember(network, HEAD, "first")
    other = copy.deepcopy(network)
    other.head = nn.Linear(4, 9)
    base.remember(other, HEAD, "second")
    train(other)
    assert base.task_vector(other, HEAD, "second").head["head.weight"].shape == (9, 4)


def test_frozen_parameter_that_changed_is_refused(network: nn.Module) -> None:
    network.dense.weight.requires_grad_(False)
    base = Base()
    base.remember(network, HEAD, "topic")
    with torch.no_grad():
        network.dense.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"'topic' cannot be collected: dense\.weight was frozen .* have changed"):
        base.task_vector(network, HEAD, "topic")


def test_weight_under_an_adapter_that_changed_is_refused(bert: BertModel) -> None:
    module = nn.ModuleDict(
        {"model": get_peft_model(bert, LoraConfig(r=2, target_modules=["query"])), "head": nn.Linear(2, 2)}
    )
    base = Base()
    base.remember(module, HEAD, "topic")
    layer = module["model"].base_model.model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"model\.encoder\.layer\.0\.attention\.self\.query\.weight was frozen"):
        base.task_vector(module, HEAD, "topic")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_that_diverged_is_refused_by_task_and_parameter(network: nn.Module, value: float) -> None:
    base = Base()
    base.remember(network, HEAD, "topic")
    with torch.no_grad():
        network.dense.weight[1, 2] = value
        network.conv.bias[0] = value
    with pytest.raises(ValueError, match=r"'topic' cannot be collected") as error:
        base.task_vector(network, HEAD, "topic")
    assert "dense.weight has NaN or infinite" in str(error.value)
    assert "conv.bias has NaN or infinite" in str(error.value)
    assert "embed.weight" not in str(error.value)


def test_diverged_adapter_is_refused(bert: BertModel) -> None:
    module = nn.ModuleDict(
        {"model": get_peft_model(bert, LoraConfig(r=2, target_modules=["query"])), "head": nn.Linear(2, 2)}
    )
    base = Base()
    base.remember(module, HEAD, "topic")
    with torch.no_grad():
        module["model"].base_model.model.encoder.layer[1].attention.self.query.lora_B["default"].weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query\.weight has NaN or infinite"):
        base.task_vector(module, HEAD, "topic")


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_and_full_tasks_share_a_base(bert: BertModel, lora_first: bool) -> None:
    def full_module() -> nn.Module:
        return nn.ModuleDict({"model": copy.deepcopy(bert), "head": nn.Linear(2, 2)})

    def lora_module() -> nn.Module:
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["query"])
        return nn.ModuleDict({"model": get_peft_model(copy.deepcopy(bert), config), "head": nn.Linear(2, 2)})

    name = "model.encoder.layer.0.attention.self.query.weight"
    other = "model.encoder.layer.0.attention.self.key.weight"
    base, vectors = Base(), {}
    for is_lora in (lora_first, not lora_first):
        module = lora_module() if is_lora else full_module()
        base.remember(module, HEAD, "lora" if is_lora else "full")
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        vectors[is_lora] = base.task_vector(module, HEAD, "lora" if is_lora else "full")
    assert vectors[True].base_hashes == vectors[False].base_hashes
    assert isinstance(vectors[True].deltas[name], LowRank)
    torch.testing.assert_close(vectors[False].deltas[name], torch.full((16, 16), 0.1), rtol=1e-6, atol=1e-7)
    assert vectors[True].kinds[name] == vectors[False].kinds[name] == "matrix"
    # What LoRA leaves alone is absent or zero, which merge alike.
    unchanged = vectors[True].deltas.get(other)
    assert unchanged is None or not unchanged.any()
    assert vectors[False].deltas[other].abs().min() > 0


def test_hash_sees_values_shape_and_dtype_but_not_layout() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert hash_tensor(matrix) == hash_tensor(matrix.T.contiguous().T)
    others = [matrix.reshape(3, 2), matrix.double(), matrix.bfloat16(), -matrix, matrix + 1e-6, matrix[:, :2]]
    assert len({hash_tensor(tensor) for tensor in [matrix, *others]}) == 7
    assert hash_tensor(torch.tensor(1.0)) != hash_tensor(torch.tensor([1.0]))
    assert hash_tensor(torch.zeros(0, 2)) != hash_tensor(torch.zeros(2, 0))


def test_fingerprint_ignores_order_only() -> None:
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    assert fingerprint({"a": "1", "b": "2"}) != fingerprint({"a": "2", "b": "1"})
    assert describe_difference({"a": "1"}, {"a": "1"}) is None
