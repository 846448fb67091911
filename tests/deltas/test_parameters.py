"""What belongs to the backbone, what to the head, and what each tensor is called."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2Model, T5Config, T5Model

from lightning_drm.deltas import backbone_parameters, head_state


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_names_are_the_same_under_every_wrapper(bert: BertModel) -> None:
    config = LoraConfig(r=2, bias="all", target_modules=["query", "word_embeddings"], modules_to_save=["pooler"])
    plain = Holder(copy.deepcopy(bert))
    peft = Holder(get_peft_model(copy.deepcopy(bert), copy.deepcopy(config)))
    injected = Holder(inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), copy.deepcopy(bert)))
    names = [name for name, tensor in plain.state_dict().items() if tensor.is_floating_point()]
    assert list(backbone_parameters(plain, [])) == names
    for wrapped in (peft, injected):
        parameters = backbone_parameters(wrapped, [])
        assert list(parameters) == names
        assert {name: p.kind for name, p in parameters.items()} == {
            name: p.kind for name, p in backbone_parameters(plain, []).items()
        }
    assert backbone_parameters(peft, [])["model.encoder.layer.0.attention.self.query.weight"].adapter is not None
    assert backbone_parameters(peft, [])["model.encoder.layer.0.attention.self.query.bias"].adapter is None


def test_head_that_peft_saves_has_its_plain_name() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    wrapped = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(r=2, task_type=TaskType.SEQ_CLS, target_modules=["query"])
    )
    state = head_state(Holder(wrapped), ["model.classifier"])
    assert list(state) == ["model.classifier.weight", "model.classifier.bias"]
    live = wrapped.base_model.model.classifier.modules_to_save["default"]
    assert state["model.classifier.weight"] is live.weight


def test_kinds(network: nn.Module) -> None:
    assert {name: parameter.kind for name, parameter in backbone_parameters(network, ["head"]).items()} == {
        "embed.weight": "embedding",
        "norm.weight": "other",
        "norm.bias": "other",
        "norm.running_mean": "other",
        "norm.running_var": "other",
        "dense.weight": "matrix",
        "dense.bias": "other",
        "conv.weight": "convolution",
        "conv.bias": "other",
        "token": "other",
    }


def test_kinds_of_other_layers() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "rnn": nn.LSTM(3, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm((4, 5)),
            "gpt2": GPT2Model(GPT2Config(vocab_size=5, n_positions=4, n_embd=8, n_layer=1, n_head=2)),
        }
    )
    kinds = {name: parameter.kind for name, parameter in backbone_parameters(layers, []).items()}
    assert kinds["attention.in_proj_weight"] == "matrix"
    assert kinds["attention.in_proj_bias"] == "other"
    assert kinds["norm.weight"] == "other"
    assert kinds["gpt2.wte.weight"] == "embedding"
    assert kinds["gpt2.wpe.weight"] == "embedding"
    assert kinds["gpt2.h.0.attn.c_attn.weight"] == "matrix"
    assert kinds["gpt2.h.0.attn.c_attn.bias"] == "other"


def test_tied_weights_have_one_name() -> None:
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5Model(config)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    names = list(backbone_parameters(model, []))
    assert "shared.weight" in names
    assert not [name for name in names if "embed_tokens" in name]
    assert sum(p.tensor.numel() for p in backbone_parameters(model, []).values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_buffers_count_where_checkpoints_hold_floats() -> None:
    module = nn.Module()
    module.register_buffer("counter", torch.tensor(3))
    module.register_buffer("scale", torch.ones(2))
    module.register_buffer("cache", torch.ones(2), persistent=False)
    module.head = nn.BatchNorm1d(2)
    assert list(backbone_parameters(module, ["head"])) == ["scale"]
    # A head is one task's own, so all that a checkpoint holds of it is kept.
    assert list(head_state(module, ["head"])) == list(module.head.state_dict(prefix="head."))


def test_head_may_be_a_parameter_or_a_submodule(network: nn.Module) -> None:
    assert list(head_state(network, ["head", "token"])) == ["token", "head.weight", "head.bias"]
    assert "token" not in backbone_parameters(network, ["head", "token"])
    assert list(head_state(network, [])) == []


def test_head_names_match_whole_parts() -> None:
    module = nn.ModuleDict({"head": nn.Linear(2, 2), "head2": nn.Linear(2, 2)})
    assert list(head_state(module, ["head"])) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("names", [["classifier"], ["head", "classifier"], ["hea"], ["head.weigh"]])
def test_head_that_matches_nothing_is_refused(network: nn.Module, names: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"The head '{names[-1]}' names no parameter"):
        backbone_parameters(network, names)
    with pytest.raises(ValueError, match=rf"The head '{names[-1]}' names no parameter"):
        head_state(network, names)


def test_head_that_shares_weights_is_refused() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    module["head"].weight = module["embed"].weight
    with pytest.raises(ValueError, match=r"shares weights with the backbone.*embed\.weight = head\.weight"):
        backbone_parameters(module, ["head"])
