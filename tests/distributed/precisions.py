"""Run by test_precisions on two processes: fits under FSDP2 in every precision, full and with adapters.

torchrun --nproc_per_node 2 precisions.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback
from lightning_drm.deltas.sharded import whole
from lightning_drm.merging.low_rank import densify

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}  # Lightning refuses 64-true under this strategy
LAYERS = ("0", "3")


class Sharded(VectorTask):
    def __init__(self, adapted: bool) -> None:
        super().__init__()
        if adapted:
            adapters = LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights="gaussian")
            inject_adapter_in_model(adapters, self.backbone)

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Trained(L.Callback):
    """Keeps the matrices as they are when training ends, in doubles."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {number: self._weight(pl_module.backbone[int(number)]) for number in LAYERS}

    def _weight(self, layer: torch.nn.Module) -> Tensor:
        if not hasattr(layer, "base_layer"):
            return whole(layer.weight.detach()).double()
        up, down = (whole(part["default"].weight.detach()).double() for part in (layer.lora_B, layer.lora_A))
        return whole(layer.base_layer.weight.detach()).double() + layer.scaling["default"] * (up @ down)


def run(precision: str, adapted: bool) -> dict[str, float]:
    """How far deltas and merged weights are from what training left, and how large the deltas are."""
    merge, trained, dtype = DRMMergeCallback(["a"], method=Average()), Trained(), DTYPES[precision]
    base = {number: VectorTask().backbone[int(number)].weight.detach().to(dtype).double() for number in LAYERS}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(strategy=strategy, devices=2, precision=precision, callbacks=[trained, merge])
    trainer.fit(Sharded(adapted), Vectors(0))
    merged = merge.merged_module.task_module("a").backbone
    found = {"delta": 0.0, "merged": 0.0, "size": 0.0}
    for number in LAYERS:
        expected = trained.weights[number] - base[number]
        delta = merge.task_vectors["a"].deltas[f"backbone.{number}.weight"]
        layer = merged[int(number)]
        weight = whole((layer.base_layer if hasattr(layer, "base_layer") else layer).weight.detach())
        assert weight.dtype == dtype
        if not (densify(delta).is_meta):  # another rank keeps it
            found["delta"] = max(found["delta"], float((densify(delta).double() - expected).abs().max()))
        error = (weight.double() - trained.weights[number]).abs() / trained.weights[number].abs().clamp(min=0.1)
        found["merged"] = max(found["merged"], float(error.max()) / torch.finfo(dtype).eps)
        found["size"] = max(found["size"], float(expected.abs().max()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {f"{precision} {adapted}": run(precision, adapted) for precision in DTYPES for adapted in (False, True)}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
