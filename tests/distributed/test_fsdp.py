"""FSDP1 around small modules: in whatever way it wraps them, what is merged is what DDP gives, plain and whole."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.processes

FITS = (
    "whole", "layers", "recomputed", "gradients only", "tied", "adapted", "adapted layers", "normed", "wrapping",
    "sharded files",
)  # fmt: skip
REFUSALS = {
    "fit again": "VectorTask was fitted or tested under FSDPStrategy before",
    "fuse again": "VectorTask was fitted or tested under FSDPStrategy before",
    "test again": "MultiTaskModule was fitted or tested under FSDPStrategy before",
    "divided layers": "has an auto_wrap_policy for Sequential, with weights that all tasks share",
    "divided tasks": "has an auto_wrap_policy for VectorTask, with weights that all tasks share",
    "apart": "train apart from the others, as they are ignored or not wrapped: head.weight, head.bias",
    "rounded": "would keep the buffers backbone.4.running_mean, backbone.4.running_var in torch.bfloat16",
}


@pytest.fixture(scope="module")
def found(on_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_two_ranks("fsdp_cases.py")


@pytest.mark.parametrize("case", FITS)
def test_the_merged_model_is_that_of_ddp(found: list[dict[str, Any]], case: str):
    assert max(of_rank[case] for of_rank in found) < 1e-6


def test_a_merged_model_is_measured_right(found: list[dict[str, Any]]):
    assert all(of_rank["shared layers"] for of_rank in found)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_fsdp_cannot_do_is_refused_on_each_rank(found: list[dict[str, Any]], case: str):
    assert all(REFUSALS[case] in of_rank[case] for of_rank in found)
