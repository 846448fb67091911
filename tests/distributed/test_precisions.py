"""FSDP2 in every precision: a delta is what training added to the base as it was trained."""

from collections.abc import Callable
from typing import Any

import pytest

from distributed.precisions import DTYPES

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def found(on_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_two_ranks("precisions.py")


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", DTYPES)
def test_deltas_are_exact_and_the_merged_weights_are_the_trained_ones(
    found: list[dict[str, Any]], precision: str, adapted: bool
):
    for of_rank in found:
        case = of_rank[f"{precision} {adapted}"]
        assert case["delta"] < 1e-6
        assert case["merged"] < 2  # units of the last place
        assert case["size"] > 1e-3, "the case shows nothing"
