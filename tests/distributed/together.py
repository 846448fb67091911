"""Run by test_fit_together on one or several processes: fits, merges and tests two tasks in every way that is compared.

    torchrun --nproc_per_node 2 together.py FOLDER

FOLDER has the pretrained model and a csv file. Each case leaves a run folder in FOLDER/<backend><processes>, where the
ones on several processes also merge again what a single one left. The global batch is the same on any number of them.
"""

import gc
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.models.bert.modeling_bert import BertLayer

from helpers.on_cpu import FSDPOnCPU
from helpers.tiny import COLORS, Tokens
from lightning_drm import (
    DARETIES,
    DRM,
    TIES,
    WUDI,
    Average,
    DRMMergeCallback,
    LiNeS,
    MergeTrainer,
    MultiTaskDataModule,
    TransformerTask,
)
from lightning_drm.data import TextTask

GLOBAL_BATCH = 8
# By the number of processes; FSDP1 on two of them is enough to show its way of sharding.
STRATEGIES = {1: ("alone",), 2: ("ddp", "fsdp", "fsdp_layers", "fsdp2"), 4: ("ddp", "fsdp2")}
SNAPSHOT = 5
NUM_SAMPLES = 30  # no number of processes divides them
METHODS = {
    "drm": DRM(density=0.5),
    "ties": TIES(density=0.4),
    "dare": DARETIES(density=0.6),
    "lines": LiNeS(DRM(density=0.5)),
}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value", "dense"], lora_dropout=0.0)


def sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    # Adam would blow up gradients that are zero but for rounding, such as those of the keys' biases.
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def make_data(folder: Path, size: int) -> MultiTaskDataModule:
    texts = TextTask(
        str(folder / "texts.csv"), str(folder / "base"), batch_size=GLOBAL_BATCH // size, eval_batch_size=3
    )
    return MultiTaskDataModule({"texts": texts, "tokens": Tokens(GLOBAL_BATCH // size)})


def make_module(folder: Path, lora: bool, **options: object) -> TransformerTask:
    adapters, lr = (LORA, 0.1) if lora else (None, 0.02)
    return TransformerTask(str(folder / "base"), pooling="mean", lora=adapters, optimizer=sgd(lr), **options)


def arguments(strategy: str, size: int) -> dict:
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this node
    fsdp = {"gloo": FSDPOnCPU, "nccl": FSDPStrategy}[os.environ["BACKEND"]]
    strategies = {
        "alone": "auto",
        "ddp": "ddp",
        "fsdp": fsdp(),
        "fsdp_layers": fsdp(auto_wrap_policy={BertLayer, torch.nn.Linear}),  # with adapters, wrappers around and inside
        "fsdp2": ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
    }
    return {
        "strategy": strategies[strategy],
        "accelerator": {"gloo": "cpu", "nccl": "gpu"}[os.environ["BACKEND"]],
        "devices": devices,
        "num_nodes": size // devices,
        "max_epochs": 2,
        "limit_val_batches": 0,
        "inference_mode": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }


def run(folder: Path, out: Path, strategy: str, size: int, lora: bool) -> None:
    """The whole way, with a run folder."""
    L.seed_everything(0, verbose=False)
    data = make_data(folder, size)
    snapshots = [] if strategy in ("fsdp", "fsdp_layers") else [SNAPSHOT]  # FSDP1 cannot take any
    merge = DRMMergeCallback(
        data.task_names,
        method=Average(),
        dirpath=out,
        snapshots=snapshots,
        statistics=["gram", "fisher"],
        statistics_samples=NUM_SAMPLES,
    )
    trainer = MergeTrainer(callbacks=[merge], **arguments(strategy, size))
    # As many batches as there are, of any size, for the heads on the base to see the same samples.
    trainer.fit(make_module(folder, lora), datamodule=data, base_batches=100)


def run_in_memory(folder: Path, out: Path, strategy: str, size: int) -> None:
    """Lightning's own Trainer, deltas kept in host memory by their owners, and the merged module tested."""
    data = make_data(folder, size)
    merge = DRMMergeCallback(data.task_names, method=Average(), store="cpu")
    L.seed_everything(0, verbose=False)
    for task, task_data in data.tasks.items():
        L.seed_everything(0, verbose=False)
        module = make_module(folder, False, num_classes=len(COLORS))
        module.task_name = task
        L.Trainer(callbacks=[merge], **arguments(strategy, size)).fit(module, datamodule=task_data)
    merged = merge.merged_module
    merged.record_samples = True
    trainer = L.Trainer(**arguments(strategy, size))
    results = trainer.test(merged, datamodule=data, verbose=False)
    metrics = {name: torch.tensor(value) for part in results for name, value in part.items()}
    metrics |= {f"num_samples/{task}": torch.tensor(len(merged.samples(task) or [])) for task in data.task_names}
    finetuned = merge.finetuned_module(make_module(folder, False, num_classes=len(COLORS)), "tokens")
    tensors = {
        f"finetuned.{n}": t.detach().cpu() for n, t in finetuned.task_module("tokens").backbone.named_parameters()
    }
    held = sum(delta.numel() for v in merge.task_vectors.values() for delta in v.deltas.values() if not delta.is_meta)
    every = sum(delta.numel() for v in merge.task_vectors.values() for delta in v.deltas.values())
    metrics |= {"share": torch.tensor(held / every)}
    if trainer.is_global_zero:
        save_file({**metrics, **tensors}, out)


def collect_again(folder: Path, out: Path, strategy: str, size: int) -> None:
    """Takes statistics of what one process finetuned."""
    data = make_data(folder, size)
    merge = DRMMergeCallback(data.task_names, WUDI(input_weight=1.0), out, statistics_samples=NUM_SAMPLES)
    trainer = MergeTrainer(callbacks=[merge], **arguments(strategy, size))
    trainer.collect(make_module(folder, False), datamodule=data)
    trainer = MergeTrainer(callbacks=[merge], **arguments(strategy, size))
    trainer.merge(make_module(folder, False), datamodule=data)


def copy_of_alone(folder: Path, again: Path, *left_out: str) -> None:
    """Gives all ranks a copy of what one process left."""
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.copytree(
            folder / f"{os.environ['BACKEND']}1/alone_full",
            again,
            ignore=shutil.ignore_patterns("merged", "report*", *left_out),
        )
        (again / "copied").touch()
    else:
        while not (again / "copied").exists():
            time.sleep(0.05)


def merge_again(folder: Path, out: Path, method: str, strategy: str, size: int) -> None:
    """Merges what one process finetuned."""
    data = make_data(folder, size)
    merge = DRMMergeCallback(data.task_names, method=METHODS[method], dirpath=out)
    MergeTrainer(callbacks=[merge], **arguments(strategy, size)).merge(make_module(folder, False), datamodule=data)


def main(folder: Path) -> None:
    gc.freeze()  # or each of the runs would look through all that was imported, several times
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    out = folder / f"{os.environ['BACKEND']}{size}"
    for strategy in STRATEGIES[size]:
        run(folder, out / f"{strategy}_full", strategy, size, lora=False)
        run(folder, out / f"{strategy}_lora", strategy, size, lora=True)
        run_in_memory(folder, out / f"{strategy}_memory.safetensors", strategy, size)
    for strategy, method in zip(itertools.cycle(STRATEGIES[size]), METHODS, strict=False):
        again = out / f"again_{method}"
        copy_of_alone(folder, again)
        merge_again(folder, again, method, strategy, size)
    for strategy in STRATEGIES[size]:
        again = out / f"collected_{strategy}"
        copy_of_alone(folder, again, "statistics.safetensors")
        collect_again(folder, again, strategy, size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
