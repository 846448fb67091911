"""Ranks that are late, or that do not fit together."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny import VectorTask
from lightning_drm import Average, DRMMergeCallback

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


def check_merged(folder: Path) -> None:
    """Whether the merged model is the base with all of the only task's deltas."""
    deltas = load_file(folder / "tasks/task/deltas.safetensors")
    merged = load_file(folder / "merged/model.safetensors")
    for name, base in VectorTask().named_parameters():
        if not name.startswith("head"):
            torch.testing.assert_close(merged[name], base.detach() + deltas[name], rtol=0, atol=0)
            assert deltas[name].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("num_processes", "victim"), [(1, 0), (1, 1), (2, 1)], ids=["launcher-0", "launcher-1", "torchrun-1"]
)
def test_a_rank_that_is_killed_while_it_merges_is_named(
    num_processes: int, victim: int, tmp_path: Path, launch: Launch
):
    """Also to a rank that is busy for minutes; and what they stored can be merged."""
    done = launch([HERE / "killed_rank.py", tmp_path, victim], num_processes, check=False)
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    assert done.returncode
    named = [
        rf"\[rank: {victim}\] Child process with PID \d+ terminated with code -9",  # Lightning
        rf"rank +: {victim} .*\n +exitcode +: -9",  # torchrun
        rf"Rank {victim} \(process \d+ on .*\) died without an error message",
    ]
    assert any(re.search(pattern, done.stdout + done.stderr) for pattern in named), done.stderr[-3000:]
    assert not (tmp_path / "merged").exists()
    merge = DRMMergeCallback(["task"], method=Average(), dirpath=tmp_path)
    merge.restore()
    merge.fuse(VectorTask())
    check_merged(tmp_path)


REFUSALS = {
    "tensor parallel": "tensor_parallel_size 2, but weights are only sharded over data",
    "late layers": "Late has no weights yet: under ModelParallelStrategy, load them before the fit",
    "other base": "Task 'a' starts from another base on rank 1 than on rank 0",
    "dropped": "Task 'a' has an evaluation loader that drops samples (drop_last=True)",
}


@pytest.fixture(scope="module")
def found(on_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_two_ranks("two_ranks.py")


def test_merging_may_take_longer_than_the_time_out_of_training(found: list[dict[str, Any]]):
    assert found[0]["too late"], "the training's process group has no time-out, so the case shows nothing"
    check_merged(Path(found[0]["folder"]) / "late")


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_ranks_cannot_do_together_is_refused_on_each(found: list[dict[str, Any]], case: str, rank: int):
    assert REFUSALS[case] in found[rank][case]


def test_buffers_are_those_of_the_first_rank_on_all(found: list[dict[str, Any]]):
    first, second = (of_rank["buffers"] for of_rank in found)
    assert first["live"] != pytest.approx(second["live"], abs=1e-4), "the case shows nothing"
    assert first["merged"] == second["merged"]
    assert first["merged"] == pytest.approx(first["live"], abs=1e-6)


def test_no_rank_reads_a_file_while_another_replaces_it(found: list[dict[str, Any]]):
    for of_rank in found:
        assert of_rank["statistics"]["read"] > 0, "the case shows nothing"
        assert of_rank["statistics"]["replaced"] == 0
