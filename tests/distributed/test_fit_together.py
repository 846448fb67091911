"""Fit, merge and test on 1, 2 and 4 processes give the same deltas, merged weights and accuracies.

A fit's arithmetic depends on how a batch is divided: deltas are compared up to float32 rounding. Merging is compared
bit by bit, on the deltas that each number of processes has stored, and on the same deltas for all.
"""

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.compared import largest_difference, require_average_of_stored
from distributed.together import SNAPSHOT, STRATEGIES

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]
TASKS = ("texts", "tokens")
Shared = Callable[[int], Path]
on_every_case = pytest.mark.parametrize(
    ("size", "strategy"),
    [(size, strategy) for size, strategies in STRATEGIES.items() if size > 1 for strategy in strategies],
)


@pytest.fixture(scope="module")
def shared(inputs: Path, alone: Path, backend: str, launch: Launch) -> Shared:
    """What so many processes leave."""

    @cache
    def leave(size: int) -> Path:
        launch([HERE / "together.py", inputs], size, BACKEND=backend)
        return inputs / f"{backend}{size}"

    return leave


@pytest.mark.parametrize("finetune", ["full", "lora"])
@on_every_case
def test_deltas_heads_and_merged_weights_are_those_of_one_process(
    alone: Path, shared: Shared, size: int, strategy: str, finetune: str
):
    files = [f"tasks/{task}/{name}.safetensors" for task in TASKS for name in ("deltas", "head", "base_head")]
    if strategy not in ("fsdp", "fsdp_layers"):  # FSDP1 takes no snapshots
        folders = [f"tasks/{task}/snapshots/{SNAPSHOT}" for task in TASKS]
        files += [f"{folder}/{name}.safetensors" for folder in folders for name in ("deltas", "head")]
    for file in [*files, "merged/model.safetensors"]:
        ours, theirs = (
            load_file(folder / file)
            for folder in (shared(size) / f"{strategy}_{finetune}", alone / f"alone_{finetune}")
        )
        assert largest_difference(ours, theirs) < 2e-6, file
        changed = [tensor for name, tensor in theirs.items() if not name.endswith("::down")]  # those start at random
        least = 0.004 if "snapshots" in file else 0.05  # after 5 steps, and at the end
        assert max(float(tensor.abs().max()) for tensor in changed) > least, "the case shows nothing"


@pytest.mark.parametrize("finetune", ["full", "lora"])
@on_every_case
def test_accuracies_are_those_of_one_process(alone: Path, shared: Shared, size: int, strategy: str, finetune: str):
    ours, theirs = (
        json.loads((folder / "report.json").read_text())["accuracy"]
        for folder in (shared(size) / f"{strategy}_{finetune}", alone / f"alone_{finetune}")
    )
    assert ours == theirs
    assert all(0 < theirs["merged"][task] < 1 for task in TASKS), "the case shows nothing"


@pytest.mark.parametrize("finetune", ["full", "lora"])
@on_every_case
def test_ranks_merge_what_they_stored_to_the_bit(inputs: Path, shared: Shared, size: int, strategy: str, finetune: str):
    require_average_of_stored(shared(size) / f"{strategy}_{finetune}", inputs / "base", TASKS)


@pytest.mark.parametrize("method", ["drm", "ties", "dare", "lines"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_changes_no_bit_of_a_merge(alone: Path, shared: Shared, size: int, method: str):
    ours, theirs = (load_file(folder / f"again_{method}/merged/model.safetensors") for folder in (shared(size), alone))
    assert largest_difference(ours, theirs) == 0
    ours, theirs = (
        json.loads((folder / f"again_{method}/report.json").read_text()) for folder in (shared(size), alone)
    )
    assert ours["accuracy"] == theirs["accuracy"]


def largest_relative_difference(ours: Path, theirs: Path) -> float:
    """Of each matrix, beside its largest entry."""
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert any(key.startswith("gram") for key in one)
    return max(float((one[n] - t).abs().max() / t.abs().max().clamp(min=1e-12)) for n, t in other.items())


@pytest.mark.parametrize("finetune", ["full", "lora"])
@on_every_case
def test_statistics_are_those_of_one_process(alone: Path, shared: Shared, size: int, strategy: str, finetune: str):
    """Of finetunes that differ by rounding: inputs, and gradients, too, of near 1e-6."""
    for task in TASKS:
        file = f"tasks/{task}/statistics.safetensors"
        ours, theirs = shared(size) / f"{strategy}_{finetune}" / file, alone / f"alone_{finetune}" / file
        assert largest_relative_difference(ours, theirs) < 1e-3
        assert {key.partition("::")[0] for key in load_file(theirs)} == {"gram", "fisher"}


@on_every_case
def test_statistics_of_the_same_deltas_are_the_same(alone: Path, shared: Shared, size: int, strategy: str):
    for task in TASKS:
        file = f"tasks/{task}/statistics.safetensors"
        later, ended = alone / "collected_alone" / file, load_file(alone / "alone_full" / file)
        assert largest_relative_difference(shared(size) / f"collected_{strategy}" / file, later) < 2e-6
        for name, tensor in load_file(later).items():
            torch.testing.assert_close(tensor, ended[name], rtol=1e-5, atol=1e-6)  # as the fit ended, with its module
    ours, theirs = (
        load_file(folder / "merged/model.safetensors")
        for folder in (shared(size) / f"collected_{strategy}", alone / "collected_alone")
    )
    assert largest_difference(ours, theirs) < 2e-6
    averaged = load_file(alone / "alone_full/merged/model.safetensors")
    assert largest_difference(ours, averaged) > 1e-3, "the case shows nothing"


@on_every_case
def test_each_rank_keeps_its_share_and_every_sample_counts_once(alone: Path, shared: Shared, size: int, strategy: str):
    ours, theirs = (
        load_file(shared(size) / f"{strategy}_memory.safetensors"),
        load_file(alone / "alone_memory.safetensors"),
    )
    assert float(theirs.pop("share")) == 1
    assert float(ours.pop("share")) < 0.8, "rank 0 of a tiny model: one embedding is more than half of it"
    assert [float(ours[f"num_samples/{task}"]) for task in TASKS] == [12, 11]
    assert largest_difference(ours, theirs) < 2e-6
