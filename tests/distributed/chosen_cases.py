"""Run by test_chosen_weights on two processes: the best checkpoint's and averaged weights under each strategy.

torchrun --nproc_per_node 2 chosen_cases.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from helpers.on_cpu import FSDPOnCPU
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback
from lightning_drm.deltas.sharded import whole

DECAY = 0.8


class Normed(VectorTask):
    """Its validation loss is best after the second of three epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(5))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", [3.0, 1.0, 2.0][self.current_epoch], sync_dist=True)


class Sharded(Normed):
    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Validated(Vectors):
    def val_dataloader(self) -> DataLoader:
        return self.test_dataloader()


class Steps(L.Callback):
    """Notes all weights after each step, in float64."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        state = {name: whole(tensor.detach()).double().clone() for name, tensor in pl_module.state_dict().items()}
        self.states.append(state)


def fit(kind: type[Normed], strategy: object, weights: Any, *callbacks: L.Callback) -> DRMMergeCallback:
    L.seed_everything(0, verbose=False)
    merge = DRMMergeCallback(["a"], Average(), weights=weights, batch_norm_batches=0)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = quiet_trainer(
        strategy=strategy, devices=2, max_epochs=3, callbacks=[merge, *callbacks], enable_checkpointing=saves
    )
    trainer.fit(kind(), Validated(0))
    return merge


def difference(merge: DRMMergeCallback, expected: dict[str, Tensor]) -> float:
    """The largest one of the merged model of one task, which is the task's own."""
    state = merge.merged_module.task_module("a").state_dict()
    floating = [name for name in expected if not name.endswith("num_batches_tracked")]
    assert len(floating) == 12
    return max(float((whole(state[name]).double() - expected[name].double()).abs().max()) for name in floating)


def best(kind: type[Normed], strategy: object, folder: Path) -> list[float]:
    """How far what is merged is from the best checkpoint and from the last one, read by hand."""
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1)
    merge = fit(kind, strategy, "best", saving)
    states = [torch.load(folder / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2)]
    return [difference(merge, state) for state in states]


class Given(L.Callback):
    """Says that a file is the best checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
        trainer.checkpoint_callback.best_model_path = str(self.path)


def best_of_ddp(strategy: object, folder: Path) -> list[float]:
    """The same where torch crashes when it puts a whole checkpoint together, as FSDP1 does without a GPU."""
    states = [torch.load(folder / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2)]
    never = ModelCheckpoint(folder, monitor="val_loss", every_n_epochs=9)
    merge = fit(Normed, strategy, "best", never, Given(folder / "epoch=1.ckpt"))
    return [difference(merge, state) for state in states]


def averaged() -> list[float]:
    steps = Steps()
    merge = fit(Normed, "ddp", "averaged", EMAWeightAveraging(decay=DECAY), steps)
    average = steps.states[0]
    for state in steps.states[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * state[name] for name in average}
    for expected in (average, steps.states[-1]):  # buffers are rank 0's
        for tensor in expected.values():
            torch.distributed.broadcast(tensor, 0)
    return [difference(merge, average), difference(merge, steps.states[-1])]


def fsdp2(**arguments: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **arguments)


CASES: dict[str, Callable[[Path], list[float]]] = {
    "ddp": lambda folder: best(Normed, "ddp", folder),
    "fsdp": lambda folder: best_of_ddp(FSDPOnCPU(), folder.with_name("ddp")),
    "fsdp layers": lambda folder: best_of_ddp(FSDPOnCPU(auto_wrap_policy={nn.Linear}), folder.with_name("ddp")),
    "fsdp2": lambda folder: best(Sharded, fsdp2(save_distributed_checkpoint=False), folder),
    "averaged": lambda folder: averaged(),
}
REFUSED: dict[str, Callable[[Path], object]] = {
    "fsdp in pieces": lambda folder: best(Normed, FSDPOnCPU(state_dict_type="sharded"), folder),
    "fsdp2 in pieces": lambda folder: best(Sharded, fsdp2(), folder),
    "fsdp average": lambda folder: fit(Normed, FSDPOnCPU(), "averaged", EMAWeightAveraging()),
    "fsdp2 average": lambda folder: fit(Sharded, fsdp2(), "averaged", EMAWeightAveraging()),
    "nothing saved": lambda folder: fit(
        Normed, "ddp", "best", ModelCheckpoint(folder, monitor="val_loss", every_n_epochs=9)
    ),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found: dict[str, object] = {name: case(folder / name) for name, case in CASES.items()}
    for name, refused in REFUSED.items():
        try:
            refused(folder / name)
        except ValueError as error:
            found[name] = str(error)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
