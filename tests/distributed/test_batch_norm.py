"""Batch norms of merged models on two processes: equal statistics on both, and those of all batches together."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.processes

CASES = ("ddp", "fsdp", "fsdp2", "run", "synchronized")


@pytest.fixture(scope="module")
def found(on_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_two_ranks("batch_norm_cases.py")


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_all_batches(found: list[dict[str, Any]], case: str):
    assert max(of_rank[case][0] for of_rank in found) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_equal_on_both_ranks(found: list[dict[str, Any]], case: str):
    first, second = (of_rank[case][1] for of_rank in found)
    assert first == second
    assert len(first) == 2 * 4 * 6
