"""Sharing a plan out over ranks: costs that are those of the algorithms, and shares that are even."""

import random

import pytest

from benchmarks.llama import llama_parameters
from lightning_drm import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, KnOTS
from lightning_drm.fusion import Override, Recipe
from lightning_drm.fusion.share_out import Balance, balance, costs, share_out

TASKS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture(scope="module")
def llama():
    return llama_parameters()


@pytest.mark.parametrize("num_ranks", [8, 64, 512])
@pytest.mark.parametrize("rule", ["average", "method"])
@pytest.mark.parametrize(
    "method", [DRM(), DRM("vertical"), TIES(), DARETIES(), Average(), IsoC(), IsoCTS(), TSVM(), KnOTS()], ids=repr
)
def test_llama_is_shared_out_evenly(method, rule, num_ranks, llama):
    """Within a tenth of the mean, unless whole parameters do not allow it: then within Graham's 4/3 of the best."""
    recipe = Recipe(method, overrides=[Override("lm_head.weight", rule=rule)])
    kinds, shapes = llama
    found = costs({name: recipe.treatment(name, kind, TASKS) for name, kind in kinds.items()}, shapes, len(TASKS))
    shares = share_out(found, num_ranks)
    loads = [sum(found[name] for name in share) for share in shares]
    mean = sum(found.values()) / num_ranks
    possible = balance(found, num_ranks).possible * mean
    crowded = len(found) < 8 * num_ranks  # few large parameters for each rank
    assert max(loads) <= max((4 / 3 if crowded else 1.1) * possible, max(found.values()))
    assert sorted(name for share in shares for name in share) == sorted(kinds)
    assert balance(found, num_ranks).largest == pytest.approx(max(loads) / mean)


def test_the_bound_counts_whole_parameters():
    assert balance({"a": 2.0, "b": 2.0, "c": 2.0}, 2) == Balance(4 / 3, 4 / 3)
    assert balance({"a": 3.0, "b": 1.0}, 2) == Balance(1.5, 1.5)
    assert balance({"a": 1.0, "b": 1.0}, 2) == Balance(1.0, 1.0)


def test_shares_do_not_depend_on_the_order():
    draws = random.Random(0)
    found = {f"p{index}": float(draws.choice([1, 2, 3, 5, 8])) for index in range(50)}
    shares = share_out(found, 7)
    names = list(found)
    draws.shuffle(names)
    assert [set(share) for share in share_out({name: found[name] for name in names}, 7)] == list(map(set, shares))


def test_more_ranks_than_parameters():
    assert sorted(map(len, share_out({"a": 1.0, "b": 2.0}, 4))) == [0, 0, 1, 1]
    assert share_out({}, 2) == [[], []]
    assert balance({}, 2).largest == 1.0


def cost_of(recipe, shape, kind="matrix", rank=None, num_tasks=8):
    treatment = recipe.treatment("p", kind, TASKS[:num_tasks])
    return costs({"p": treatment}, {"p": shape}, num_tasks, {} if rank is None else {"p": rank})["p"]


def test_costs_follow_the_algorithms():
    drm, vertical = Recipe(DRM()), Recipe(DRM("vertical"))
    assert cost_of(drm, (3072, 768)) > 5 * cost_of(drm, (768, 3072)), "the joint basis has as many rows as the matrix"
    assert cost_of(vertical, (768, 3072)) == cost_of(drm, (3072, 768))
    assert cost_of(drm, (64, 16, 4, 4), "matrix") == cost_of(drm, (64, 256))
    assert cost_of(drm, (4096, 4096)) > 20 * cost_of(drm, (4096, 4096), rank=128), "factors stay factors"
    assert cost_of(drm, (768, 768)) > 3 * cost_of(drm, (768, 768), "embedding")
    assert cost_of(Recipe(TSVM()), (768, 768)) > cost_of(Recipe(IsoC()), (768, 768))
    assert cost_of(Recipe(TIES()), (10, 10), num_tasks=8) == 2 * cost_of(Recipe(TIES()), (10, 10), num_tasks=4)


def test_exceptions_have_their_own_costs():
    split = Recipe(DRM(), overrides=[Override("p", split=4)])
    kept = Recipe(DRM(), overrides=[Override("p", rule="base")])
    assert cost_of(split, (2048, 512)) == pytest.approx(4 * cost_of(Recipe(DRM()), (512, 512)))
    assert cost_of(kept, (512, 512)) < cost_of(Recipe(Average()), (512, 512))
    by_columns = Recipe(DRM(), overrides=[Override("p", split=[256, 256, 512])])
    assert cost_of(by_columns, (256, 1024)) == pytest.approx(
        2 * cost_of(Recipe(DRM()), (256, 256)) + cost_of(Recipe(DRM()), (256, 512))
    )
