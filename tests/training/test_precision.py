"""Every precision that Lightning trains in: a delta is what training added to the base as it was trained."""

import copy
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback, MergeSession, MergeTrainer, MultiTaskDataModule
from lightning_drm.merging.low_rank import densify
from lightning_drm.training.strategies import refuse_strategy

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
WAYS = ("full", "lora", "frozen")


def module(way: str, task: int) -> VectorTask:
    made = VectorTask(2 + task)
    if way == "lora":
        adapters = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="gaussian")
        inject_adapter_in_model(adapters, made.backbone)
    elif way == "frozen":
        made.backbone[0].requires_grad_(False)
    return made


class Trained(Callback):
    """Keeps the weights as they are when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.backbone = copy.deepcopy(pl_module.backbone)


def weights(backbone: nn.Module) -> dict[str, Tensor]:
    """Weights in doubles, of adapted layers as the product of scaled factors adds up."""
    found = {}
    for name, layer in backbone.named_children():
        plain = layer.base_layer if hasattr(layer, "base_layer") else layer
        for key, tensor in plain.named_parameters():
            found[f"{name}.{key}"] = tensor.detach().double()
        if plain is not layer:
            up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
            found[f"{name}.weight"] += layer.scaling["default"] * (up @ down).detach()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", DTYPES)
def test_deltas_are_exact_and_the_merged_weights_are_their_mean(precision: str, way: str):
    merge = DRMMergeCallback(("one", "two"), method=Average())
    dtype, finetuned = DTYPES[precision], []
    for index, task in enumerate(merge.tasks):
        seed_everything(0, verbose=False)
        kept = Trained()
        trainer = quiet_trainer(callbacks=[kept, merge.for_task(task)], precision=precision)
        trainer.fit(module(way, index), Vectors(index, 2 + index))
        finetuned.append(weights(kept.backbone))
    base = {name: tensor.to(dtype).double() for name, tensor in weights(VectorTask().backbone).items()}
    for vector, trained in zip(merge.task_vectors.values(), finetuned, strict=True):
        assert {name.removeprefix("backbone.") for name in vector.deltas} >= {"3.weight"}
        for name, delta in vector.deltas.items():
            expected = trained[name.removeprefix("backbone.")] - base[name.removeprefix("backbone.")]
            torch.testing.assert_close(densify(delta).double(), expected, rtol=1e-6, atol=1e-7)
        assert float(densify(vector.deltas["backbone.3.weight"]).abs().max()) > 1e-3, "the case shows nothing"
    merged = merge.merged_module.task_module("one").backbone
    for name, tensor in merged.named_parameters():
        assert tensor.dtype == dtype
        expected = sum(trained[name] for trained in finetuned) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


class Template(VectorTask):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_task(self, num_classes: int) -> None:
        self.head = nn.Linear(5, num_classes)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_what_was_fitted_is_merged_and_tested_again(precision: str, tmp_path: Path):
    data = MultiTaskDataModule({"one": Vectors(0), "two": Vectors(1, 3)})

    def trainer() -> MergeTrainer:
        merge = DRMMergeCallback(data.task_names, method=Average(), dirpath=tmp_path)
        settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2}
        return MergeTrainer(
            callbacks=[merge], precision=precision, enable_progress_bar=False, enable_model_summary=False, **settings
        )

    def read() -> tuple[bytes, bytes]:
        return (tmp_path / "merged/model.safetensors").read_bytes(), (tmp_path / "report.json").read_bytes()

    trainer().fit(Template(), datamodule=data)
    first = read()
    trainer().merge(Template(), datamodule=data)
    assert read() == first
    trainer().test(Template(), datamodule=data)
    assert read() == first


def test_quantizing_precisions_are_refused_before_training():
    # Lightning makes no Trainer with this precision where there is no GPU, but it makes the strategy.
    strategy = SingleDeviceStrategy("cpu", precision_plugin=BitsandbytesPrecision("int8"))
    with pytest.raises(ValueError, match="BitsandbytesPrecision replaces layers by quantized ones"):
        refuse_strategy(strategy)


def test_weights_that_stand_for_others_are_refused_before_training():
    task = VectorTask()
    weight = task.backbone[0].weight.detach()
    task.backbone[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(ValueError, match=r"1 weights are quantized.*: backbone\.0\.weight \(TwoTensor\)"):
        MergeSession(("one", "two"), method=Average()).note_base(task)
