"""Parameters, heads and vocabularies that differ between the base and its finetunes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertForMaskedLM, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import models
from lightning_drm import Average, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.architecture.alignment import Alignment
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan
from lightning_drm.deltas import TaskVector, hash_tensor, save_task_vector
from lightning_drm.fusion import Recipe
from lightning_drm.merging import LowRank

pytestmark = pytest.mark.usefixtures("small_pieces")
SUM = TaskArithmetic(scale=1.0)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("policy", ["intersection", "base_fill"])
def test_policies(policy, tmp_path):
    base = models.base_model("clip")
    base.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("ab", 1):
        models.finetune("clip", base, seed).save_pretrained(tmp_path / task)
    start = base.state_dict()
    lost = next(name for name in start if name.endswith("encoder.layers.0.mlp.fc1.weight"))  # with a prefix, once
    extra, other = (lost.replace("layers.0", f"layers.{i}") for i in (5, 1))
    edit(tmp_path / "a", lambda tensors: tensors.update({extra: tensors.pop(lost)}))
    paths = {task: str(tmp_path / task) for task in "ab"}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", SUM, policy=policy)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    b = load_file(tmp_path / "b" / "model.safetensors")
    if policy == "intersection":
        assert torch.equal(merged[lost], start[lost])
    else:
        torch.testing.assert_close(merged[lost], b[lost])
    a = load_file(tmp_path / "a" / "model.safetensors")
    torch.testing.assert_close(merged[other], a[other] + b[other] - start[other])
    assert extra not in merged
    assert any(extra in note for note in result.notes)
    assert any(lost in note for note in result.notes)


def test_heads_follow_from_the_classes(tmp_path):
    """A masked language model as base keeps its own head; classifiers' poolers go with their heads."""
    torch.manual_seed(0)
    config = models.ARCHITECTURES["bert"][2]
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "a")
    merge_checkpoints(tmp_path / "base", {"a": str(tmp_path / "a")}, tmp_path / "out", SUM)
    merged, a = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a"))
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert merged.keys() == start.keys()
    for name in start:
        expected = start[name] if name.startswith("cls.") else a[name]
        torch.testing.assert_close(merged[name], expected)
    head = load_file(tmp_path / "out" / "heads" / "a.safetensors")
    assert sorted(head) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]


def test_heads_by_pattern(tmp_path):
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = models.finetune("llama", base, 1)
    tuned.save_pretrained(tmp_path / "a")
    merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", SUM, heads=["lm_head.*"])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], base.state_dict()["lm_head.weight"])
    head = load_file(tmp_path / "out" / "heads" / "a.safetensors")
    assert torch.equal(head["lm_head.weight"], tuned.state_dict()["lm_head.weight"])


def test_a_module_that_no_configuration_describes(tmp_path):
    torch.manual_seed(0)
    start = {"net.fc.weight": torch.randn(4, 3), "net.fc.bias": torch.randn(4), "steps": torch.tensor(5)}
    save_file(start, tmp_path / "base.safetensors")
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in start.items()}}, tmp_path / "a.ckpt")
    paths = {"a": str(tmp_path / "a.ckpt")}
    merge_checkpoints(tmp_path / "base.safetensors", paths, tmp_path / "out", SUM)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged, {k: v + 1 if v.is_floating_point() else v for k, v in start.items()})


def test_stored_deltas(tmp_path):
    base = models.base_model("bert")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    dense, low = "model.encoder.layer.0.output.dense.bias", "model.encoder.layer.0.output.dense.weight"
    deltas = {dense: torch.randn(16), low: LowRank(torch.randn(16, 2), torch.randn(2, 24))}
    hashes = {f"model.{name}": hash_tensor(value) for name, value in base.state_dict().items()}
    head = {"head.weight": torch.ones(2)}
    vector = TaskVector("a", deltas, {dense: "other", low: "matrix"}, head, hashes, {})
    save_task_vector(vector, tmp_path / "run" / "tasks" / "a")
    paths = {"a": str(tmp_path / "run")}
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", SUM)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    start = base.state_dict()
    for name, value in merged.items():
        delta = deltas.get(f"model.{name}")
        change = 0 if delta is None else delta if isinstance(delta, torch.Tensor) else delta.dense()
        torch.testing.assert_close(value, start[name] + change)
    assert torch.equal(load_file(tmp_path / "out" / "heads" / "a.safetensors")["head.weight"], head["head.weight"])

    edit(tmp_path / "base", lambda tensors: tensors["encoder.layer.0.output.dense.bias"].add_(1))
    plan = make_plan(str(tmp_path / "base"), paths, Recipe(SUM), MismatchPolicy())
    assert "its deltas were taken from another base" in plan.problems[0]


def tokenizer(words, folder):
    model = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token=words[0]).save_pretrained(folder)


@pytest.mark.parametrize("vocabulary", ["base", "intersection"])
@pytest.mark.parametrize("with_tokenizers", [True, False])
def test_vocabularies(vocabulary, with_tokenizers, tmp_path):
    """Task a lacks the last two words and swaps two; task b has a word more."""
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    words = [f"w{row}" for row in range(40)]
    own = {"a": [*words[:3], words[4], words[3], *words[5:38]], "b": [*words, "new"]}
    if not with_tokenizers:
        own["a"] = words[:38]
    rows = {}
    for seed, (task, vocabulary_of_task) in enumerate(own.items(), 1):
        models.finetune("llama", base, seed).save_pretrained(tmp_path / task)
        known = torch.tensor([words.index(word) if word in words else 0 for word in vocabulary_of_task])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            edit(tmp_path / task, lambda tensors, name=name, known=known: tensors.update({name: tensors[name][known]}))
        config = tmp_path / task / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": len(known)}))
        rows[task] = known
        if with_tokenizers:
            tokenizer(vocabulary_of_task, tmp_path / task)
    if with_tokenizers:
        tokenizer(words, tmp_path / "base")
    paths = {task: str(tmp_path / task) for task in own}

    strict = make_plan(str(tmp_path / "base"), paths, Recipe(SUM), MismatchPolicy())
    if with_tokenizers:
        assert "a: its tokenizer shares 38 tokens with the base's, 2 of them in other rows" in strict.problems[0]
    assert any("embed_tokens.weight has 41 rows" in problem for problem in strict.problems)

    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", SUM, vocabulary=vocabulary)
    merged, start = load_file(tmp_path / "out" / "model.safetensors"), base.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = start[name].clone()
        for seed, task in enumerate(own, 1):
            delta = models.finetune("llama", base, seed).state_dict()[name] - start[name]
            if task == "a" or vocabulary == "intersection":
                delta[38:] = 0
            expected += delta
        torch.testing.assert_close(merged[name], expected)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 40


def test_alignment_prefers_the_whole_model():
    names = ["model.bert.embeddings.w", "model.bert.encoder.layer.0.w", "model.bert.encoder.layer.1.w", "model.head.w"]
    targets = ["embeddings.w", "encoder.layer.0.w", "encoder.layer.1.w"]
    assert Alignment.between(names, targets) == Alignment("model.bert.", "", 3)
    assert Alignment.between(targets, names) == Alignment("", "model.bert.", 3)
    assert Alignment.between(["x.z"], targets).num_matches == 0


def test_what_is_not_selected_is_bit_identical(tmp_path):
    base = models.base_model("bert")
    base.save_pretrained(tmp_path / "base")
    models.adapter("bert", base, 1).save_pretrained(tmp_path / "a")
    paths = {"a": tmp_path / "a"}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", Average(), output_format="full")
    merged, start = load_file(tmp_path / "out" / "model.safetensors"), base.state_dict()
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert changed == {name for name in merged if name.endswith(("query.weight", "output.dense.weight"))}
    assert result.num_merged == len(changed)
    assert result.num_kept == len(merged) - len(changed)
