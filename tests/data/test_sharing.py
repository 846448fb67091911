"""Every sample counts once, on any number of processes."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from data import count_test_samples
from helpers.warm import python, torchrun
from lightning_drm.data.sharing import Share, exactness_problem, num_replicas


@settings(deadline=None, max_examples=60)
@given(num_rows=st.integers(1, 40), world_size=st.integers(1, 9), batch_size=st.integers(1, 7), shuffle=st.booleans())
def test_repeated_samples_of_any_data_are_told_by_their_place(num_rows, world_size, batch_size, shuffle):
    counted, num_batches = {}, set()
    for rank in range(world_size):
        sampler = DistributedSampler(range(num_rows), world_size, rank, shuffle=shuffle)
        loader = DataLoader(range(num_rows), batch_size, sampler=sampler)
        for batch_idx, batch in enumerate(loader):
            share = Share.of(loader, batch_idx)
            assert share.size == len(batch)
            first, step = share.places
            for number, sample in enumerate(batch[: share.new].tolist()):
                place = first + number * step
                assert place not in counted
                counted[place] = sample
        num_batches.add(len(loader))
    assert sorted(counted) == list(range(num_rows)), "the places of a data set of its size"
    assert sorted(counted.values()) == list(range(num_rows))
    assert shuffle or all(place == sample for place, sample in counted.items())
    assert len(num_batches) == 1


def test_without_a_distributed_sampler_nothing_is_repeated():
    assert Share.of(DataLoader(range(5), 2), 2) == Share(1, 1, (4, 1))
    assert Share.of([1, 2, 3], 1) == Share(None, None, (1, 1))


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


def test_one_process_has_one_share():
    assert num_replicas(None) == 1
    assert num_replicas(Trainer(accelerator="cpu", devices=1, logger=False)) == 1


@pytest.mark.processes
@pytest.mark.parametrize("num_processes", [2, 3])
def test_scores_under_ddp_are_those_of_one_process(tmp_path, reviews, num_processes):
    alone = count_test_samples.main(reviews, num_processes=1)
    out = tmp_path / "out.json"
    command = [count_test_samples.__file__, reviews, out, tmp_path / "cache", num_processes]
    ranks = torchrun(["--standalone", f"--nproc_per_node={num_processes}"], command)
    done = python(*ranks, environment={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    shared = json.loads(out.read_text())
    assert {task: alone[f"samples/{task}"] for task in "ab"} == {"a": 10, "b": 7}
    assert shared == pytest.approx(alone)
    assert all(0 < value < 1 for name, value in alone.items() if "samples" not in name)
