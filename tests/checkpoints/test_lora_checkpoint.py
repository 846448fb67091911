"""Checkpoints of modules with injected LoRA: what Lightning saves merges to what the live module computes."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from helpers import models
from lightning_drm import TaskArithmetic, TransformerTask, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan
from lightning_drm.fusion import Recipe

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "word_embeddings", "output.dense"], "use_rslora": True}
LORA |= {"rank_pattern": {"query": 3}, "alpha_pattern": {"query": 5}}
ITSELF = TaskArithmetic(1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    models.base_model("bert").save_pretrained(folder)
    return folder


def train(module, checkpoint):
    """A few real steps, and what `ModelCheckpoint` would write."""
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(40, (5,)), "labels": torch.tensor(i % 3)} for i in range(8)]
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=4, enable_model_summary=False, log_every_n_steps=1, **silent)
    trainer.fit(module, DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(checkpoint)


def fresh(base, **lora):
    torch.manual_seed(3)
    adamw = partial(torch.optim.AdamW, lr=0.05)
    return TransformerTask(str(base), num_classes=3, lora=LoraConfig(**{**LORA, **lora}), optimizer=adamw)


def expected(module):
    """The live backbone with peft's own delta added to every adapted weight."""
    merged = {}
    for name, parameter in module.model.bert.named_parameters():
        if ".base_layer." in name:
            layer = module.model.bert.get_submodule(name.split(".base_layer.")[0])
            parts = layer.get_delta_weight("default") if name.endswith("weight") else 0
            merged[name.replace(".base_layer", "")] = (parameter + parts).detach()
        elif "lora_" not in name:
            merged[name] = parameter.detach()
    return merged


def compare(folder, module):
    written, live = load_file(folder / "model.safetensors"), expected(module)
    assert written.keys() <= live.keys()
    for name, value in written.items():
        torch.testing.assert_close(value, live[name], rtol=1e-6, atol=1e-6)
    return written


@pytest.mark.parametrize("settings", [{}, {"use_rslora": False, "alpha_pattern": {}}, {"bias": "lora_only"}])
def test_a_trained_task_is_itself(settings, base, tmp_path):
    module = fresh(base, **settings)
    train(module, tmp_path / "a.ckpt")
    result = merge_checkpoints(base, {"a": str(tmp_path / "a.ckpt")}, tmp_path / "out", ITSELF)
    written, start = compare(tmp_path / "out", module), load_file(base / "model.safetensors")
    changed = {name for name, value in written.items() if not torch.equal(value, start[name])}
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.query.weight"} <= changed
    assert result.survived["a"] == pytest.approx(1, abs=1e-4)
    head = load_file(tmp_path / "out" / "heads" / "a.safetensors")
    assert torch.equal(head["model.classifier.weight"], module.model.classifier.weight)


def test_the_configuration_of_a_command_line(base, tmp_path):
    """LightningCLI keeps plain values of a configuration in place of the LoraConfig."""
    words = [f"--model.backbone={base}", "--model.num_classes=3", "--model.lora=peft.LoraConfig"]
    words += ["--model.lora.r=3", "--model.lora.lora_alpha=9", '--model.lora.target_modules=["query"]']
    cli = LightningCLI(TransformerTask, run=False, args=words, save_config_callback=None)
    train(cli.model, tmp_path / "a.ckpt")
    merge_checkpoints(base, {"a": str(tmp_path / "a.ckpt")}, tmp_path / "out", ITSELF)
    compare(tmp_path / "out", cli.model)


class Holder(LightningModule):
    def __init__(self, model, lora):
        super().__init__()
        self.save_hyperparameters({"adapters": [lora], "path": Path("somewhere")})
        self.model = model


def save(module, path):
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def test_a_wrapped_model_with_saved_modules(base, tmp_path):
    """Around a PeftModel, with an adapter's own copy of a module."""
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["query"], modules_to_save=["pooler"])
    torch.manual_seed(1)
    model = get_peft_model(models.base_model("bert"), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save(Holder(model, lora), tmp_path / "a.ckpt")
    merge_checkpoints(base, {"a": str(tmp_path / "a.ckpt")}, tmp_path / "out", ITSELF)
    written = load_file(tmp_path / "out" / "model.safetensors")
    live = copy.deepcopy(model).merge_and_unload().state_dict()
    assert written.keys() == live.keys()
    for name, value in written.items():
        torch.testing.assert_close(value, live[name], rtol=1e-6, atol=1e-6)


def test_another_base_is_refused(base, tmp_path):
    save(fresh(base), tmp_path / "a.ckpt")
    torch.manual_seed(9)
    other = models.base_model("bert")
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight += 1e-3
    other.save_pretrained(tmp_path / "other")
    plan = make_plan(str(tmp_path / "other"), {"a": str(tmp_path / "a.ckpt")}, Recipe(), MismatchPolicy())
    assert plan.problems == [
        "a: its deltas were taken from another base: encoder.layer.0.attention.self.query.weight differs from "
        f"{tmp_path / 'other'}."
    ]


def test_no_adapter_comes_of_a_checkpoint(base, tmp_path):
    save(fresh(base), tmp_path / "a.ckpt")
    mismatch = MismatchPolicy(output_format="adapter")
    plan = make_plan(str(base), {"a": str(tmp_path / "a.ckpt")}, Recipe(), mismatch)
    assert plan.problems == ["The output cannot be an adapter: a is a checkpoint with LoRA."]
