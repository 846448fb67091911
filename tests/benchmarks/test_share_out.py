"""How evenly the parameters of Llama-3.1-8B are shared out over ranks, for eight tasks; computed, nothing is merged."""

import pytest

from benchmarks.llama import llama_parameters
from lightning_drm import DRM, TIES, IsoC
from lightning_drm.fusion import Override, Recipe
from lightning_drm.fusion.share_out import balance, costs

TASKS = [f"task {index}" for index in range(8)]


HEAD_BY_METHOD = [Override("lm_head.weight", rule="method")]  # alone, DRM-H of it costs ten of the next largest


@pytest.mark.parametrize(
    "recipe",
    [Recipe(DRM()), Recipe(DRM(), overrides=HEAD_BY_METHOD), Recipe(DRM("vertical")), Recipe(IsoC()), Recipe(TIES())],
    ids=["DRM-H", "DRM-H, lm_head too", "DRM-V", "Iso-C", "TIES"],
)
def test_llama(request, benchmark, capsys, recipe):
    kinds, shapes = llama_parameters()
    found = costs({name: recipe.treatment(name, kind, TASKS) for name, kind in kinds.items()}, shapes, len(TASKS))
    balances = {num_ranks: balance(found, num_ranks) for num_ranks in (8, 64, 512)}
    benchmark.pedantic(lambda: balance(found, 512), rounds=3)
    with capsys.disabled():
        print(f"\n  {request.node.callspec.id}, largest share over the mean:")
        for num_ranks, reached in balances.items():
            print(f"    {num_ranks:3} ranks: {reached.largest:.3f}, the best possible at least {reached.possible:.3f}")
