"""Data sets that several processes share: training in one order, evaluation without counting a sample twice.

A `DistributedSampler` gives every process the same number of samples, which it reaches by repeating some: accuracies
come out wrong. Our own sets are therefore filled up to a multiple of the number of processes with samples whose label
is `IGNORE_INDEX`. Then the sampler has nothing to repeat, every process sees the same number of batches, and a loss or
metric that leaves out `IGNORE_INDEX` is exact.

Nobody can know how to make such a sample of a user's own data set. There, repeated samples are recognized by their
place in the sampler's order, and left out of the count: see `repeated`.
"""

from collections.abc import Sized
from typing import Any, cast

import torch
from datasets import Dataset as Table
from lightning import Trainer
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

IGNORE_INDEX = -100
"""The label that losses and metrics leave out (PyTorch's and transformers' convention)."""

Sample = dict[str, Any]


class PaddedDataset(Dataset[Sample]):
    """A table, filled up to a multiple of `multiple` with copies of its first sample labeled `IGNORE_INDEX`."""

    def __init__(self, table: Table, multiple: int) -> None:
        self.table = table
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-len(self.table) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.table):
            return dict(self.table[index])
        return {**self.table[0], "labels": IGNORE_INDEX}


def taking_turns(order: Sampler[int], trainer: Trainer | None) -> Sampler[int]:
    """A training order that the trainer's processes go through in turns, while it trains.

    Process r of W gets the samples r, r + W, …, so batches of size b/W on W processes are together the batches of size
    b on one. Left alone, Lightning would shuffle in another way for each number of processes.

    Args:
        order: The order, which every process draws alike.
        trainer: The trainer, if there is one.
    """
    if trainer is None or not trainer.training:
        return order
    # Also for one process: the wrapper draws a whole epoch at once, which leaves generators in another state.
    turns = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return DistributedSamplerWrapper(order, shuffle=False, **turns)


def num_replicas(trainer: Trainer | None) -> int:
    """How many processes share one data set: the world size, less what tensor parallelism uses; 1 without a trainer."""
    sampler_kwargs = trainer.distributed_sampler_kwargs if trainer is not None else None
    return sampler_kwargs["num_replicas"] if sampler_kwargs else 1


def repeated(loader: Any, start: int, count: int) -> Tensor:
    """Which of the next samples of an evaluation loader repeat others, for other processes to have as many.

    Args:
        loader: What this process iterates over.
        start: How many samples of it came before.
        count: How many come next.

    Returns:
        ``(count,)``, true for repeated samples. All false without a `DistributedSampler`: then nothing is repeated, or
        the user decided what each process sees.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return torch.zeros(count, dtype=torch.bool)
    # A process's n-th sample stands at n · num_replicas + rank of the order that all share; repeats follow its end.
    places = torch.arange(start, start + count) * sampler.num_replicas + sampler.rank
    return torch.ge(places, len(cast(Sized, sampler.dataset)))


def exactness_problem(loader: Any) -> str | None:
    """Why an evaluation loader cannot be shared by several processes so that every sample counts once, if so.

    Args:
        loader: The loader, before or after Lightning gave it a sampler.
    """
    if not isinstance(loader, DataLoader):
        return None
    if loader.drop_last or getattr(loader.sampler, "drop_last", False):
        return "drops samples (drop_last=True), other ones for each number of processes; use drop_last=False"
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return (
            f"draws batches by {type(loader.batch_sampler).__name__}, whose order hides which samples are repeated for "
            "other processes; use batch_size"
        )
    return None
