"""Run by test_fsdp on two processes: fits of small modules under FSDP1, next to the same fits under DDP.

torchrun --nproc_per_node 2 fsdp_cases.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from helpers.on_cpu import FSDPOnCPU
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback, MultiTaskModule
from lightning_drm.deltas import head_state


class Tied(VectorTask):
    """Uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.backbone.append(nn.Linear(5, 5))
            self.backbone.append(nn.Linear(5, 5))
        self.backbone[-1].weight = self.backbone[-2].weight


class Adapted(VectorTask):
    """Trains adapters and its head."""

    def __init__(self) -> None:
        super().__init__()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=True), self.backbone)


class Normed(VectorTask):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(5))


class Wrapping(VectorTask):
    """Wraps itself, part by part, with the names and the options of one flat parameter per part."""

    parts: tuple[str, ...] = ("backbone", "head")

    def configure_model(self) -> None:
        for part in self.parts:
            wrapped = FullyShardedDataParallel(self.get_submodule(part), device_id=torch.device("cpu"))
            setattr(self, part, wrapped)


class Forgetful(Wrapping):
    parts = ("backbone",)


def fit(module: L.LightningModule, strategy: object, **arguments: object) -> DRMMergeCallback:
    L.seed_everything(0, verbose=False)
    merge = DRMMergeCallback(["a"], method=Average())
    quiet_trainer(strategy=strategy, devices=2, callbacks=[merge], **arguments).fit(module, Vectors(0))
    return merge


def fit_with_checkpoint(folder: Path, module: L.LightningModule, strategy: object) -> DRMMergeCallback:
    L.seed_everything(0, verbose=False)
    callbacks = [merge := DRMMergeCallback(["a"], method=Average()), ModelCheckpoint(folder, save_last=True)]
    trainer = quiet_trainer(strategy=strategy, devices=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, Vectors(0))
    return merge


def seeded(kind: type[VectorTask]) -> VectorTask:
    L.seed_everything(3, verbose=False)
    return kind()


def difference(ours: DRMMergeCallback, theirs: DRMMergeCallback) -> float:
    """The largest one of merged weights and heads, which must be plain tensors under plain names."""
    states: list[dict[str, Tensor]] = [merge.merged_module.state_dict() for merge in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert not any(isinstance(child, FullyShardedDataParallel) for child in ours.merged_module.modules())
    trained, base = ours.merged_module.task_module("a").backbone[0].weight, VectorTask().backbone[0].weight
    assert float((trained - base).abs().max()) > 1e-3, "the case shows nothing"
    return max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])


FITS: dict[str, tuple[type[VectorTask], Callable[[], FSDPOnCPU]]] = {
    "whole": (VectorTask, FSDPOnCPU),
    "layers": (VectorTask, lambda: FSDPOnCPU(auto_wrap_policy={nn.Linear})),
    "recomputed": (
        VectorTask,
        lambda: FSDPOnCPU(auto_wrap_policy={nn.Sequential}, activation_checkpointing_policy={nn.Linear}),
    ),
    "gradients only": (VectorTask, lambda: FSDPOnCPU(sharding_strategy="SHARD_GRAD_OP")),
    "tied": (Tied, FSDPOnCPU),
    "adapted": (Adapted, FSDPOnCPU),
    "adapted layers": (Adapted, lambda: FSDPOnCPU(auto_wrap_policy={nn.Linear})),
    "normed": (Normed, FSDPOnCPU),
    "wrapping": (Wrapping, FSDPOnCPU),
}


def test_twice(again: object) -> object:
    """Under FSDP1 and then under another strategy."""
    once, twice = (MultiTaskModule({"a": seeded(VectorTask)}) for _ in range(2))
    right = quiet_trainer(strategy="ddp", devices=2).test(once, Vectors(0), verbose=False)
    assert quiet_trainer(strategy=FSDPOnCPU(), devices=2).test(twice, Vectors(0), verbose=False) == right
    return quiet_trainer(strategy=again, devices=2).test(twice, Vectors(0), verbose=False)


def test_shared(policy: set[type[nn.Module]]) -> bool:
    """Whether FSDP1 measures what DDP does: two tasks around one backbone, as fusing makes them."""
    template = seeded(VectorTask)
    ones, others = (head_state(seeded(VectorTask), ["head"]) for _ in range(2))
    both = {"a": ones, "b": {name: -tensor for name, tensor in others.items()}}
    merged = MultiTaskModule.assemble(dict.fromkeys(both, template), heads=both)
    loaders = [Vectors(seed).test_dataloader() for seed in range(2)]
    right = quiet_trainer(strategy="ddp", devices=2).test(merged, loaders, verbose=False)
    sharded = FSDPOnCPU(auto_wrap_policy=policy)
    return quiet_trainer(strategy=sharded, devices=2).test(merged, loaders, verbose=False) == right


def fuse_again() -> object:
    merge = fit(module := VectorTask(), FSDPOnCPU())
    return merge.fuse(module)


def fit_again() -> object:
    fit(module := VectorTask(), FSDPOnCPU())
    return fit(module, "ddp")


REFUSED: dict[str, Callable[[], object]] = {
    "fit again": fit_again,
    "fuse again": fuse_again,
    "test again": lambda: test_twice("ddp"),
    "divided layers": lambda: test_shared({nn.Sequential}),
    "divided tasks": lambda: test_shared({VectorTask}),
    "apart": lambda: fit(Forgetful(), FSDPOnCPU()),
    "rounded": lambda: fit(Normed(), FSDPOnCPU(), precision="bf16-mixed"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found: dict[str, object] = {}
    for name, (kind, strategy) in FITS.items():
        plain = VectorTask if kind is Wrapping else kind
        found[name] = difference(fit(seeded(kind), strategy()), fit(seeded(plain), "ddp"))
    files = fit_with_checkpoint(folder / "sharded", seeded(VectorTask), FSDPOnCPU(state_dict_type="sharded"))
    found["sharded files"] = difference(files, fit(seeded(VectorTask), "ddp"))
    found["shared layers"] = test_shared({nn.Linear})
    for name, case in REFUSED.items():
        try:
            case()
        except ValueError as error:
            found[name] = str(error)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
