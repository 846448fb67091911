"""Ranks that are late, or that do not fit together."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import VectorTask

HERE = Path(__file__).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_merging_may_take_longer_than_the_time_out_of_training(tmp_path: Path, launch: Launch):
    done = launch([HERE / "slow_rank.py", tmp_path], 2)
    assert "rank 0: " in done.stdout, "the training's process group has no time-out, so the case shows nothing"
    deltas = load_file(tmp_path / "tasks/task/deltas.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, base in VectorTask().named_parameters():
        if not name.startswith("head"):
            torch.testing.assert_close(merged[name], base.detach() + deltas[name], rtol=0, atol=0)
            assert deltas[name].abs().max() > 1e-4


REFUSALS = {
    "tensor parallel": "tensor_parallel_size 2, but weights are only sharded over data",
    "late layers": "Late has no weights yet: under ModelParallelStrategy, load them before the fit",
    "other base": "Task 'a' starts from another base on rank 1 than on rank 0",
    "dropped": "Task 'a' has an evaluation loader that drops samples (drop_last=True)",
}


@pytest.fixture(scope="module")
def refusals(launch: Launch) -> str:
    """What two ranks were refused."""
    return launch([HERE / "refusals.py"], 2).stdout


@pytest.mark.parametrize("case", REFUSALS)
def test_what_ranks_cannot_do_together_is_refused_on_each(refusals: str, case: str):
    for rank in (0, 1):
        line = next(line for line in refusals.splitlines() if line.startswith(f"{case}, rank {rank}: "))
        assert REFUSALS[case] in line
