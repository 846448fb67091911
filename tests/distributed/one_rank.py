"""Run by test_one_rank: DDP with a single process, on the CPU over gloo or on a GPU over NCCL.

BACKEND=gloo python one_rank.py FOLDER

The process group is there as with many processes, so all that meets inside of it can be tried on a single GPU.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRM, DRMMergeCallback
from lightning_drm.distributed.ranks import Ranks

ACCELERATORS, DEVICES = {"gloo": "cpu", "nccl": "gpu"}, {"gloo": "cpu", "nccl": "cuda"}


class InOrder(Vectors):
    """Their training samples are not shuffled."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=16)


def fit(folder: Path, name: str, accelerator: str, strategy: Callable[[], str | DDPStrategy]) -> None:
    """Fits two tasks, merges them, and tests the merged model."""
    merge = DRMMergeCallback(["a", "b"], method=DRM(density=0.5), dirpath=folder / name)
    data = [InOrder(number) for number in range(2)]

    def trainer(**arguments: object) -> L.Trainer:
        """One that leaves the sampler as it is."""
        same = {"use_distributed_sampler": False, "inference_mode": False}
        return quiet_trainer(accelerator=accelerator, devices=1, strategy=strategy(), **same, **arguments)

    for task, own in zip(merge.tasks, data, strict=True):
        L.seed_everything(0)
        trainer(callbacks=[merge.for_task(task)]).fit(VectorTask(), own)
    scores = trainer().test(merge.merged_module, [own.test_dataloader() for own in data], verbose=False)
    (folder / f"{name}.json").write_text(json.dumps(scores))
    state = {key: tensor.cpu() for key, tensor in merge.merged_module.task_module("a").state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")


def meet(device: str) -> dict[str, object]:
    """What a meeting of one rank inside this process group gives."""
    ranks = Ranks(0, 1, dist.new_group(backend="gloo", timeout=timedelta(weeks=1)))
    ranks.wait()
    sent = [torch.ones(3), torch.ones(3, device=device), torch.ones(3, device=device, dtype=torch.bfloat16)]
    return {
        "backend": dist.get_backend(),
        "gathered": ranks.gather("x"),
        "sum": ranks.sum(torch.ones(2)).tolist(),
        "copies": [ranks.copy_from(tensor, 0).tolist() for tensor in sent],
    }


if __name__ == "__main__":
    place, backend = Path(sys.argv[1]), os.environ["BACKEND"]
    torch.set_num_threads(1)
    fit(place, "alone", ACCELERATORS[backend], lambda: "auto")
    fit(place, "ddp", ACCELERATORS[backend], lambda: DDPStrategy(process_group_backend=backend))
    (place / "met.json").write_text(json.dumps(meet(DEVICES[backend])))
    dist.destroy_process_group()
