"""The best checkpoint's and averaged weights on two processes, under DDP, FSDP1 and FSDP2."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.processes

CASES = ("ddp", "fsdp", "fsdp layers", "fsdp2", "averaged")
REFUSALS = {
    "fsdp in pieces": "FSDPStrategy saves its checkpoints in pieces; give it state_dict_type='full'",
    "fsdp2 in pieces": "saves its checkpoints in pieces; give it save_distributed_checkpoint=False",
    "fsdp average": "EMAWeightAveraging cannot average weights that FSDPOnCPU shards",
    "fsdp2 average": "EMAWeightAveraging cannot average weights that ModelParallelStrategy shards",
    "nothing saved": "ModelCheckpoint has saved none by 'val_loss'",
}


@pytest.fixture(scope="module")
def found(on_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_two_ranks("chosen_cases.py")


@pytest.mark.parametrize("case", CASES)
def test_the_merged_weights_are_the_chosen_ones_on_each_rank(found: list[dict[str, Any]], case: str):
    for chosen, last in (of_rank[case] for of_rank in found):
        assert chosen < 1e-6
        assert last > 1e-3, "the case shows nothing"


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_had_is_refused_on_each_rank(found: list[dict[str, Any]], case: str):
    assert all(REFUSALS[case] in of_rank[case] for of_rank in found)
