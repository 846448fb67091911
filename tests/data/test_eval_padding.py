"""Every sample counts once, on any number of processes."""

import json
import os
import subprocess
import sys

import datasets
import pytest
from data import count_test_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_drm.data.padding import IGNORE_INDEX, PaddedDataset, exactness_problem, num_replicas, repeated


@settings(deadline=None, max_examples=40)
@given(num_rows=st.integers(1, 40), world_size=st.integers(1, 9))
def test_every_process_gets_as_many_samples_and_none_twice(num_rows, world_size):
    table = datasets.Dataset.from_dict({"row": range(num_rows), "labels": [1] * num_rows})
    padded = PaddedDataset(table, world_size)
    shares = [
        [padded[index] for index in DistributedSampler(padded, world_size, rank, shuffle=False)]
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [sample["row"] for share in shares for sample in share if sample["labels"] != IGNORE_INDEX]
    assert sorted(counted) == list(range(num_rows))
    assert len(padded) - num_rows == sum(sample["labels"] == IGNORE_INDEX for share in shares for sample in share)
    assert 0 <= len(padded) - num_rows < world_size


@settings(deadline=None, max_examples=40)
@given(num_rows=st.integers(1, 40), world_size=st.integers(1, 9), batch_size=st.integers(1, 7), shuffle=st.booleans())
def test_repeated_samples_of_any_data_are_told_by_their_place(num_rows, world_size, batch_size, shuffle):
    counted, num_batches = [], set()
    for rank in range(world_size):
        sampler = DistributedSampler(range(num_rows), world_size, rank, shuffle=shuffle)
        loader, seen = DataLoader(range(num_rows), batch_size, sampler=sampler), 0
        for batch in loader:
            counted += batch[~repeated(loader, seen, len(batch))].tolist()
            seen += len(batch)
        num_batches.add(len(loader))
    assert sorted(counted) == list(range(num_rows))
    assert len(num_batches) == 1


def test_without_a_distributed_sampler_nothing_is_repeated():
    assert not repeated(DataLoader(range(5), 2), 4, 1).any()
    assert not repeated([1, 2, 3], 0, 3).any()


class Longest(BatchSampler):
    """Any order of its own."""


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        (DataLoader(range(5), 2), None),
        ([1, 2], None),
        (DataLoader(range(5), 2, drop_last=True), "drops samples"),
        (DataLoader(range(5), 2, sampler=DistributedSampler(range(5), 2, 0, drop_last=True)), "drops samples"),
        (DataLoader(range(5), batch_sampler=Longest(SequentialSampler(range(5)), 2, False)), "batches by Longest"),
    ],
)
def test_loaders_that_cannot_be_shared_exactly_are_told(loader, problem):
    found = exactness_problem(loader)
    assert found is None if problem is None else problem in found


def test_one_process_pads_nothing():
    assert num_replicas(None) == 1
    assert num_replicas(Trainer(accelerator="cpu", devices=1, logger=False)) == 1
    assert len(PaddedDataset(datasets.Dataset.from_dict({"labels": [0] * 7}), 1)) == 7


@pytest.mark.processes
def test_accuracy_under_ddp_is_that_of_one_process(tmp_path, reviews):
    alone = count_test_samples.main(reviews, num_processes=1)
    out = tmp_path / "out.json"
    command = [sys.executable, count_test_samples.__file__, reviews, out, tmp_path / "cache"]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    shared = json.loads(out.read_text())
    assert alone["num_samples"] == shared["num_samples"] == {"a": 10, "b": 7}
    assert shared["accuracy"] == pytest.approx(alone["accuracy"])
    assert all(0 < accuracy < 1 for accuracy in alone["accuracy"].values())
