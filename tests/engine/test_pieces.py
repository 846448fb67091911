"""Tensors in pieces and side by side: nothing of it shows in a result."""

import math
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_drm import DARETIES, DRM, TIES, Average, TaskArithmetic
from lightning_drm.engine import Recipe, Rules, merge_files
from lightning_drm.engine import pieces as module
from lightning_drm.engine.pieces import num_threads, pieces, side_by_side, together
from lightning_drm.merging.method import PIECE_STEP

sys.path.insert(0, str(Path(__file__).parent))
import models

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (4097,), (100, 3), (9, 1000), (40, 16), (3, 5, 7), (33, 2, 4, 4)])
def test_pieces_cover_all_rows_once(shape):
    parts = pieces(shape, CPU)
    if parts == [None]:
        assert math.prod(shape) <= module.PIECE
        return
    assert [row for part in parts for row in range(shape[0])[part]] == list(range(shape[0]))
    per_row = math.prod(shape[1:])
    assert all(part.start * per_row % PIECE_STEP == 0 for part in parts)
    assert all((part.stop - part.start) * per_row <= max(module.PIECE, PIECE_STEP * per_row) for part in parts)


def test_side_by_side_does_everything_in_threads_with_one_core():
    before, barrier = torch.get_num_threads(), threading.Barrier(2)

    def work(item):
        if item < 2:
            barrier.wait(timeout=60)  # two are at work at once
        return item, torch.get_num_threads()

    done = sorted(side_by_side(work, range(20)))
    assert done == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == before
    assert 2 <= num_threads() <= 8


def test_side_by_side_ends_with_the_first_error():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01)
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        list(side_by_side(work, range(1000)))
    assert len(begun) < 100


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_together_adds_up_what_all_shares_found():
    """Several times, and what a share does to its sum is its own."""
    calls = []

    def reduce(tensor):
        calls.append(tensor.clone())
        return tensor * 10

    def work(share, add_up):
        first = add_up(torch.tensor([float(sum(share)), 1.0])).mul_(2)
        return first, add_up(torch.tensor([3.0 * len(share)]))

    first, second = together(work, range(10), reduce)
    assert first.tolist() == [20.0 * 45, 20.0 * num_threads()]
    assert second.tolist() == [30.0 * 10]
    assert [call.tolist() for call in calls] == [[45.0, num_threads()], [30.0]]


@pytest.mark.usefixtures("threads")
def test_together_tells_the_error_of_the_share_that_failed():
    def work(share, add_up):
        if 1 in share:
            raise ValueError("share with 1")
        return add_up(torch.ones(1))

    with pytest.raises(ValueError, match="share with 1"):
        together(work, range(3), lambda tensor: tensor)


RECIPES = {
    "average": Recipe(Average(), {"a": 0.5}),
    "task_arithmetic": Recipe(TaskArithmetic(0.3)),
    "ties": Recipe(TIES(0.3)),
    "ties_of_tensors": Recipe(TIES(0.3, "tensor")),
    "dare_ties": Recipe(DARETIES(0.5, seed=3)),
    "elect": Recipe(DRM(density=0.4), vectors="elect"),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_in_pieces_is_one_of_whole_parameters(name, dtype, tmp_path, monkeypatch):
    """Folders and an adapter; the same bytes, so that it does not matter where pieces end."""
    base = models.base_model("llama").to(dtype)
    base.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("ab", 1):
        models.finetune("llama", base, seed).to(dtype).save_pretrained(tmp_path / task)
    models.adapter("llama", models.base_model("llama"), 3).save_pretrained(tmp_path / "c")
    paths = {task: str(tmp_path / task) for task in "abc"}
    found = []
    for size in (128, 1 << 20):
        monkeypatch.setattr(module, "PIECE", size)
        merge_files(str(tmp_path / "base"), paths, tmp_path / f"out{size}", RECIPES[name], Rules())
        found.append(load_file(tmp_path / f"out{size}" / "model.safetensors"))
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(found[0]["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
