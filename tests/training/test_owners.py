"""Who merges what, as far as it needs no processes; tests/distributed has those."""

import torch

from lightning_drm import DRM
from lightning_drm.deltas import Parameter
from lightning_drm.fusion import Recipe
from lightning_drm.training.exchange import Owners


def matrices(*sizes: int) -> dict[str, Parameter]:
    return {f"w{size}": Parameter(torch.empty(size, size), "matrix") for size in sizes}


def test_costly_parameters_go_to_different_ranks():
    owners = Owners(Recipe(DRM()), ["a", "b"])
    owners.share_out(matrices(64, 8, 60, 4), num_ranks=2)
    assert owners["w64"] != owners["w60"]
    assert owners["w8"] == owners["w60"], "the less busy one takes the rest"
    assert set(owners) == {"w64", "w8", "w60", "w4"}


def test_what_a_later_task_trains_is_shared_out_and_nothing_changes_hands():
    owners = Owners(Recipe(DRM()), ["a", "b"])
    owners.share_out(matrices(64, 60), num_ranks=2)
    before = dict(owners)
    owners.share_out(matrices(64, 60, 90, 80), num_ranks=2)
    assert {name: owners[name] for name in before} == before
    assert owners["w90"] != owners["w80"]
