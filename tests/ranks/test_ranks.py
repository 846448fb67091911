"""Ranks that are late, or that do not fit together."""

import json
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
def said(launch: Launch) -> Callable[[str, int], str]:
    """What a rank said about a case."""
    lines = launch([HERE / "two_ranks.py"], 2).stdout.splitlines()
    return lambda case, rank: next(
        line.partition(": ")[2] for line in lines if line.startswith(f"{case}, rank {rank}: ")
    )


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_ranks_cannot_do_together_is_refused_on_each(said: Callable[[str, int], str], case: str, rank: int):
    assert REFUSALS[case] in said(case, rank)


def test_buffers_are_those_of_the_first_rank_on_all(said: Callable[[str, int], str]):
    first, second = (json.loads(said("buffers", rank)) for rank in (0, 1))
    assert first["live"] != pytest.approx(second["live"], abs=1e-4), "the case shows nothing"
    assert first["merged"] == second["merged"]
    assert first["merged"] == pytest.approx(first["live"], abs=1e-6)
