"""Evaluation sets that several processes can share without repeating a sample.

A `DistributedSampler` gives every process the same number of samples, which it reaches by repeating some: accuracies
come out wrong. Here a set is first filled up to a multiple of the number of processes with samples whose label is
`IGNORE_INDEX`. Then the sampler has nothing to repeat, every process sees the same number of batches, and a loss or
metric that leaves out `IGNORE_INDEX` is exact.
"""

from typing import Any

from datasets import Dataset as Table
from lightning import Trainer
from torch.utils.data import Dataset

IGNORE_INDEX = -100
"""The label that losses and metrics leave out (PyTorch's and transformers' convention)."""

Sample = dict[str, Any]


class PaddedDataset(Dataset[Sample]):
    """A table, filled up to a multiple of `multiple` with copies of its first sample labelled `IGNORE_INDEX`."""

    def __init__(self, table: Table, multiple: int) -> None:
        self.table = table
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-len(self.table) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.table):
            return dict(self.table[index])
        return {**self.table[0], "labels": IGNORE_INDEX}


def num_replicas(trainer: Trainer | None) -> int:
    """How many processes share one data set: the world size, less what tensor parallelism uses; 1 without a trainer."""
    sampler_kwargs = trainer.distributed_sampler_kwargs if trainer is not None else None
    return sampler_kwargs["num_replicas"] if sampler_kwargs else 1
