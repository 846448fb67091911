"""Run by test_batch_norm on two processes: statistics of batch norms, with all batches on each rank or its own share.

torchrun --nproc_per_node 2 batch_norm_cases.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from helpers.on_cpu import FSDPOnCPU
from helpers.tiny import quiet_trainer
from lightning_drm import Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule, MultiTaskModule
from lightning_drm.deltas.sharded import whole

TASKS = ("one", "two")
RANK = int(os.environ.get("RANK", "0"))


class Normed(L.LightningModule):
    """Two blocks, each with a batch norm; the second one sees what the first has made."""

    head_names = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
            self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sharded(Normed):
    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Rows(L.LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(80, 6, generator=generator) * (1 + seed) + seed
        self.train, self.test = (TensorDataset(part, (part.sum(1) > seed).long()) for part in (x[:64], x[64:]))
        self.num_classes = 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=8)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=8)


def logits_by_hand(module: nn.Module, statistics: dict[str, Tensor], x: Tensor) -> Tensor:
    p = {name: whole(tensor.detach()).double() for name, tensor in module.named_parameters()}
    for block in range(2):
        x = x @ p[f"blocks.{block}.0.weight"].T + p[f"blocks.{block}.0.bias"]
        x = x - statistics[f"blocks.{block}.1.running_mean"]
        x = x / (statistics[f"blocks.{block}.1.running_var"] + 1e-5).sqrt()
        x = (x * p[f"blocks.{block}.1.weight"] + p[f"blocks.{block}.1.bias"]).tanh()
    return x @ p["head.weight"].T + p["head.bias"]


def by_hand(module: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The mean over batches of their statistics, in float64, with the weights of a merged module."""
    p = {name: whole(tensor.detach()).double() for name, tensor in module.named_parameters()}
    seen: dict[str, list[Tensor]] = {}
    for x in batches:
        hidden = x.double()
        for block in range(2):
            hidden = hidden @ p[f"blocks.{block}.0.weight"].T + p[f"blocks.{block}.0.bias"]
            seen.setdefault(f"blocks.{block}.1.running_mean", []).append(hidden.mean(0))
            seen.setdefault(f"blocks.{block}.1.running_var", []).append(hidden.var(0))
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
            hidden = (hidden * p[f"blocks.{block}.1.weight"] + p[f"blocks.{block}.1.bias"]).tanh()
    return {name: torch.stack(found).mean(0) for name, found in seen.items()}


def shares(seed: int) -> list[Tensor]:
    """The batches of both processes, of which each has every second row."""
    x = Rows(seed).train.tensors[0]
    return [batch for rank in (0, 1) for batch in x[rank::2].split(8)]


def difference(merged: MultiTaskModule, batches_of: Callable[[int], list[Tensor]]) -> tuple[float, list[float]]:
    """The largest one of statistics and logits from a plain computation; and the statistics, to compare the ranks'."""
    found, statistics = 0.0, []
    for seed, task in enumerate(TASKS):
        module = merged.task_module(task)
        buffers = dict(module.named_buffers())
        by_name = by_hand(module, batches_of(seed))
        x = Rows(seed).test.tensors[0]
        with torch.no_grad():
            found = max(found, float((module(x) - logits_by_hand(module, by_name, x.double())).abs().max()))
        for name, expected in by_name.items():
            found = max(found, float(((buffers[name].double() - expected).abs() / (expected.abs() + 1)).max()))
            statistics += buffers[name].tolist()
    return found, statistics


class InTurns(Rows):
    """Divides its training rows as Lightning would, but in their order."""

    def train_dataloader(self) -> DataLoader:
        sampler = torch.utils.data.DistributedSampler(self.train, shuffle=False)
        return DataLoader(self.train, batch_size=8, sampler=sampler)


def by_callback(kind: type[Normed], strategy: Callable[[], object]) -> object:
    """Lightning's own Trainer: each process has its share of a task's batches."""
    merge = DRMMergeCallback(TASKS, Average())
    for seed, task in enumerate(TASKS):
        L.seed_everything(0, verbose=False)
        trainer = quiet_trainer(
            strategy=strategy(), devices=2, callbacks=[merge.for_task(task)], use_distributed_sampler=False
        )
        trainer.fit(kind(), InTurns(seed))
    return difference(merge.merged_module, shares)


def by_run(folder: Path) -> object:
    """The whole way: each process has all batches."""
    data = MultiTaskDataModule({task: Rows(seed) for seed, task in enumerate(TASKS)})
    merge = DRMMergeCallback(TASKS, Average(), folder)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    settings |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_model_summary": False}
    trainer = MergeTrainer(callbacks=[merge], **settings)
    trainer.fit(Normed(), datamodule=data, base_batches=0)
    return difference(merge.merged_module, lambda seed: list(Rows(seed).train.tensors[0].split(8)))


def synchronized() -> object:
    """Layers that would wait for each other, and a different number of batches on each rank."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(Normed())
    merged = MultiTaskModule.assemble(dict.fromkeys(TASKS, module))
    own = {0: slice(0, 3), 1: slice(3, 8)}[RANK]
    rows = {task: Rows(seed).train.tensors for seed, task in enumerate(TASKS)}
    merged.reestimate_batch_norm(
        {task: list(zip(x.split(8)[own], y.split(8)[own], strict=True)) for task, (x, y) in rows.items()}
    )
    return difference(merged, lambda seed: list(Rows(seed).train.tensors[0].split(8)))


CASES: dict[str, Callable[[Path], object]] = {
    "ddp": lambda folder: by_callback(Normed, lambda: "ddp"),
    "fsdp": lambda folder: by_callback(Normed, FSDPOnCPU),
    "fsdp2": lambda folder: by_callback(
        Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    ),
    "run": by_run,
    "synchronized": lambda folder: synchronized(),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {name: case(folder / name) for name, case in CASES.items()}
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
