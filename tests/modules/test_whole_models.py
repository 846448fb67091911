"""Kinds of task that share all of a model: what `TransformerTask` takes and refuses for them, and tied weights."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, LlamaModel

from helpers.tiny import save_tiny_bert
from helpers.tiny_language import save_tiny_llama, save_tiny_t5
from lightning_drm import MultiTaskModule, TransformerTask
from lightning_drm.deltas import Base, backbone_parameters
from lightning_drm.kinds import Language, SequenceToSequence


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"pooling": "mean"}, ["pooling must be 'model', as they need more than one vector per sample, got 'mean'"]),
        ({"head_lr": 0.1}, ["head_lr must be left out, as all of the model is merged, got 0.1"]),
        (
            {"pooling": "first", "dropout": 0.1},
            ["", "got 'first'", "dropout must be left out, as it is that of a head"],
        ),
    ],
)
def test_settings_of_heads_are_refused(llama: str, settings: dict[str, object], problems: list[str]):
    with pytest.raises(ValueError, match="For Language tasks, " + ".*".join(problems)):
        TransformerTask(llama, num_classes=0, kind=Language(), **settings)


def test_a_backbone_without_all_of_its_weights_is_refused(llama: str, tmp_path: Path):
    """Its output layer would be drawn at random, and no task has one of its own."""
    LlamaModel.from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"all weights of LlamaForCausalLM in .* but it lacks lm_head\.weight"):
        TransformerTask(str(tmp_path), num_classes=0, kind=Language())


def test_a_model_of_another_kind_is_refused(llama: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match="is no model for SequenceToSequence tasks: transformers has no AutoModelForSeq"
    ):
        TransformerTask(llama, num_classes=0, kind=SequenceToSequence())
    with pytest.raises(ValueError, match="is no model for SequenceToSequence tasks"):
        TransformerTask(save_tiny_bert(tmp_path), num_classes=0, kind=SequenceToSequence())


def test_a_whole_model_is_written_and_read_back(t5: str, tmp_path: Path):
    base = shutil.copytree(t5, tmp_path / "base")
    config = GenerationConfig.from_pretrained(base)
    config.num_beams = 3
    config.save_pretrained(base)
    task, fresh = (TransformerTask(str(base), num_classes=0, kind=SequenceToSequence()) for _ in range(2))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(1.5)
    task.save_backbone(tmp_path / "out")
    fresh.load_backbone(tmp_path / "out")
    for name, parameter in backbone_parameters(fresh, ()).items():
        assert torch.equal(parameter.tensor, backbone_parameters(task, ())[name].tensor), name
    assert fresh.model.lm_head.weight is fresh.model.shared.weight
    assert GenerationConfig.from_pretrained(tmp_path / "out").num_beams == 3


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_assembled_tasks_are_one_model(name: str, lora: LoraConfig | None, request: pytest.FixtureRequest):
    base = request.getfixturevalue(name)
    task = TransformerTask(base, num_classes=0, kind=Language(), lora=lora)
    merged = MultiTaskModule.assemble({"a": task, "b": task})
    first, second = (merged.task_module(part).model for part in "ab")
    assert isinstance(first, LlamaForCausalLM)
    assert first is second, "layers that compute alike are one"
    names = {key for key, _ in first.named_parameters()}
    assert names == {key for key, _ in LlamaForCausalLM.from_pretrained(base).named_parameters()}
    assert (first.lm_head.weight is first.model.embed_tokens.weight) == (name == "tied")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_refused(tied: str, target: str):
    """Merged as one weight, the adapter would be lost in one place or come up in the other."""
    task = TransformerTask(
        tied, num_classes=0, kind=Language(), lora=LoraConfig(r=2, target_modules=[target, "q_proj"])
    )
    with pytest.raises(ValueError, match=r"one of two layers that share a weight.*embed_tokens\.weight = .*lm_head"):
        Base().remember(task, task.head_names, "task")


def test_an_adapter_on_an_untied_output_layer_is_taken(llama: str):
    task = TransformerTask(llama, num_classes=0, kind=Language(), lora=LoraConfig(r=2, target_modules=["lm_head"]))
    adapted = [name for name, p in backbone_parameters(task, ()).items() if p.adapter is not None]
    assert adapted == ["model.lm_head.weight"]


def test_one_adapted_layer_in_two_places_is_taken():
    adapted = TransformerLike()
    (parameter,) = backbone_parameters(adapted, ()).values()
    assert parameter.adapter is adapted.first


class TransformerLike(nn.Module):
    """The same LoRA layer twice."""

    def __init__(self) -> None:
        super().__init__()
        from peft import inject_adapter_in_model

        holder = nn.ModuleDict({"layer": nn.Linear(3, 3, bias=False)})
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["layer"]), holder)
        self.first = holder["layer"]
        self.second = nn.ModuleList([holder["layer"]])
