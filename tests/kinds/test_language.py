"""Causal language models: loss, perplexity and accuracy against plain float64, whatever the batches are."""

import math
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from helpers import tiny_language
from helpers.tiny import quiet_trainer
from lightning_drm import TransformerTask
from lightning_drm.data import LanguageTask
from lightning_drm.deltas import Base, backbone_parameters
from lightning_drm.kinds import Language
from lightning_drm.merging import LowRank

finetuned = partial(tiny_language.finetuned, steps=30)
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@torch.no_grad()
def plain_scores(module: TransformerTask, data: LanguageTask, split: str) -> tuple[float, float]:
    """Mean loss and accuracy over the tokens that count, one text at a time, without padding, in float64."""
    model = module.model.eval().double()
    losses, right = [], []
    for sample in data.splits[split]:
        ids, labels = torch.tensor(sample["input_ids"]), sample["labels"].tolist()
        logits = model(input_ids=ids[None]).logits[0]
        for place in range(1, len(ids)):
            if labels[place] != -100:
                assert labels[place] == ids[place]
                losses.append(-logits[place - 1].log_softmax(0)[labels[place]].item())
                right.append(int(logits[place - 1].argmax()) == labels[place])
    model.float()
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_perplexity_and_accuracy_are_those_of_single_texts(counting: LanguageTask, llama: str, lora: LoraConfig | None):
    module = finetuned(counting, llama, lora)
    found = quiet_trainer().validate(module, datamodule=counting, verbose=False)[0]
    loss, accuracy = plain_scores(module, counting, "validation")
    assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["val_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert 0 < accuracy < 1, "the case shows nothing"
    assert (module.score, module.higher_is_better) == ("perplexity", False)


def test_perplexity_does_not_depend_on_batches(counting: LanguageTask, llama: str):
    module = finetuned(counting, llama)
    samples = counting.splits["test"]
    assert len({len(sample["input_ids"]) for sample in samples}) > 3, "nothing is padded"
    found = []
    for size, order in ((1, 1), (5, 1), (5, -1), (12, 1)):
        loader = DataLoader(list(samples)[::order], size, collate_fn=counting.collate)
        found.append(quiet_trainer().test(module, loader, verbose=False)[0])
    for scores in found[1:]:
        assert scores["test_perplexity"] == pytest.approx(found[0]["test_perplexity"], rel=1e-6)
        assert scores["test_token_accuracy"] == found[0]["test_token_accuracy"]


def test_loss_is_the_mean_over_tokens(counting: LanguageTask, llama: str):
    module = TransformerTask(llama)
    counting.setup("fit")
    module.configure_for(counting)
    module.eval()
    batch = next(iter(counting.test_dataloader()))
    logits, labels = module.classify(batch)
    expected = [
        -logits[row, place - 1].double().log_softmax(0)[labels[row, place]].item()
        for row in range(len(labels))
        for place in range(1, labels.shape[1])
        if labels[row, place] >= 0
    ]
    assert module.training_step(batch, 0).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert module.kind.count(labels) == len(expected)


def test_a_first_token_is_not_predicted():
    kind, logits = Language(), torch.zeros(1, 3, 4)
    labels = torch.tensor([[3, 2, 1]])
    assert kind.count(labels) == 2
    scores, target = kind.prediction(logits, labels)
    assert scores.shape == (1, 2, 4)
    assert target.tolist() == [[2, 1]]


def test_all_of_the_model_is_backbone_and_head_is_empty(counting: LanguageTask, llama: str):
    module = finetuned(counting, llama, steps=1)
    assert module.head_names == ()
    assert module.backbone is module.model
    assert isinstance(module.backbone, LlamaForCausalLM)
    assert {id(p.tensor) for p in backbone_parameters(module, ()).values()} == {id(p) for p in module.parameters()}
    (group,) = module.configure_optimizers().param_groups
    assert len(group["params"]) == len(list(module.parameters()))


def test_lora_trains_adapters_alone(counting: LanguageTask, llama: str):
    module = TransformerTask(llama, lora=LORA)
    counting.setup("fit")
    module.configure_for(counting)
    base = Base()
    base.remember(module, (), "task")
    assert all("lora_" in name for name, p in module.named_parameters() if p.requires_grad)
    quiet_trainer(max_epochs=None, max_steps=3, limit_val_batches=0).fit(module, datamodule=counting)
    vector = base.task_vector(module, (), "task")
    assert {name.split(".")[-2] for name in vector.deltas} == set(LORA.target_modules)
    assert all(isinstance(delta, LowRank) and delta.dense().abs().max() > 0 for delta in vector.deltas.values())


def test_padding_changes_no_logits(counting: LanguageTask, llama: str):
    module = TransformerTask(llama)
    counting.setup("fit")
    module.configure_for(counting)
    module.eval()
    batch = next(iter(counting.test_dataloader()))

    def wider(name: str, filled: int) -> Tensor:
        return torch.nn.functional.pad(batch[name], (0, 5), value=filled)

    padded = {"input_ids": wider("input_ids", 7), "attention_mask": wider("attention_mask", 0)}
    with torch.no_grad():
        logits = module.classify(batch)[0]
        again = module(**padded)[:, : logits.shape[1]]
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(again[kept], logits[kept], rtol=1e-5, atol=1e-6)


def test_a_batch_of_context_alone_has_no_loss():
    """It may be a process's whole share: no number would spoil the weights of all."""
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    loss = Language().loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
