"""Activations that are computed twice to save memory, and mixed precision: deltas, statistics and scores are the same.

transformers checkpoints a layer while it is trained; with reentrant checkpoints, the layer's input must ask for
gradients.
"""

import copy
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from peft import LoraConfig
from torch import Tensor, nn

from helpers.tiny import KINDS, quiet_trainer, save_texts, save_tiny_bert
from lightning_drm import Average, DRMMergeCallback, MultiTaskDataModule, RegMean, TransformerTask
from lightning_drm.data import TextTask
from lightning_drm.deltas import backbone_layers, backbone_parameters
from lightning_drm.distributed.ranks import ALONE
from lightning_drm.merging.low_rank import densify
from lightning_drm.training.statistics import SampledLoader

CASES = [
    ("32-true", True, False),
    ("bf16-mixed", False, False),
    ("bf16-mixed", True, True),
    ("32-true", False, True),
]


class Kept(Callback):
    """Counts how often a layer is computed, and keeps the module as it is when training ends."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls = 0
        layer = pl_module.model.encoder.encoder.layer[0]
        self.hook = layer.intermediate.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hook.remove()
        self.module = copy.deepcopy(pl_module)


def task_module(data: TextTask, base: str, lora: bool, reentrant: bool) -> TransformerTask:
    adapters = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights="gaussian") if lora else None
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    module = TransformerTask(
        base, pooling="mean", lora=adapters, optimizer=optimizer, head_lr=5e-2, gradient_checkpointing=not reentrant
    )
    data.setup("fit")
    module.configure_for(data)
    if reentrant:
        module.model.encoder.gradient_checkpointing_enable({"use_reentrant": True})
        if lora:
            module.model.encoder.enable_input_require_grads()
    return module


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights in doubles; of adapted layers, with the product of scaled factors."""
    found = {}
    for name, parameter in backbone_parameters(module, module.head_names).items():
        found[name] = parameter.tensor.detach().double()
        if (adapter := parameter.adapter) is not None:
            up, down = adapter.lora_B["default"].weight.double(), adapter.lora_A["default"].weight.double()
            found[name] = found[name] + adapter.scaling["default"] * (up @ down).detach()
    return found


def grams_of(module: TransformerTask, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gram matrices of each linear layer, one sample at a time in float64, without padding or checkpoints."""
    module = copy.deepcopy(module).double().eval()
    module.model.encoder.gradient_checkpointing_disable()
    seen: dict[str, list[Tensor]] = {}
    layers = {n: c for n, c in backbone_layers(module, module.head_names).items() if n.endswith("weight")}
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear) and "pooler" not in name:
            rows = seen.setdefault(name, [])
            layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].detach()[0]))
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                module(input_ids=ids[None, mask.bool()], attention_mask=mask[None, mask.bool()])
    joined = {name: torch.cat(rows) for name, rows in seen.items()}
    return {name: sum(torch.outer(row, row) for row in rows) / len(rows) for name, rows in joined.items()}


@pytest.mark.parametrize(("precision", "reentrant", "lora"), CASES)
def test_nothing_differs_but_memory(precision: str, reentrant: bool, lora: bool, tmp_path: Path):
    base = save_tiny_bert(tmp_path / "base")
    texts = {name: save_texts(tmp_path / f"{name}.csv", words, 0) for name, words in KINDS.items()}
    data = MultiTaskDataModule({name: TextTask(text, base, batch_size=16) for name, text in texts.items()})
    merge, kept = DRMMergeCallback(data.task_names, RegMean(num_samples=24)), {}
    starts: dict[str, Tensor] = {}
    for task, own in data.tasks.items():
        L.seed_everything(0)
        module = task_module(own, base, lora, reentrant)
        live = backbone_parameters(module, module.head_names)
        starts = starts or {name: parameter.tensor.detach().double().clone() for name, parameter in live.items()}
        kept[task] = Kept()
        settings = {"max_epochs": None, "max_steps": 6, "limit_val_batches": 0, "precision": precision}
        quiet_trainer(callbacks=[kept[task], merge.for_task(task)], **settings).fit(module, datamodule=own)
        assert kept[task].calls == 12, "each of six steps computes a layer twice"
    for task, vector in merge.task_vectors.items():
        trained = weights(kept[task].module)
        for name, delta in vector.deltas.items():
            torch.testing.assert_close(densify(delta).double(), trained[name] - starts[name], rtol=1e-6, atol=1e-8)
        changed = [name for name, delta in vector.deltas.items() if float(densify(delta).abs().max()) > 1e-4]
        assert len(changed) >= 8, "the case shows nothing"
        loader = data.tasks[task].train_dataloader()
        expected = grams_of(kept[task].module, list(SampledLoader(loader, 24, ALONE)))
        assert vector.statistics.names("gram") & expected.keys() == expected.keys() & vector.deltas.keys()
        for name in expected.keys() & vector.deltas.keys():
            found = vector.statistics.read(name, "gram").gram.double()
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    scores = quiet_trainer(precision=precision).test(merge.merged_module, datamodule=data)
    assert {name for part in scores for name in part} >= {f"score/{task}" for task in data.tasks}
    average = merge.session.fuse(Average()).task_module("pet")
    for name, tensor in weights(average).items():
        both = [weights(kept[task].module)[name] for task in data.tasks]
        torch.testing.assert_close(tensor, sum(both) / 2, rtol=1e-5, atol=1e-6)
