"""Many tasks, and matrices that are all but vectors, against the float64 references."""

import pytest
import torch
from helpers import ties
from merging.test_reference import PAIRS, bound, dense, error


def hold(name: str, shape: tuple[int, int], num_tasks: int, dtype: torch.dtype) -> None:
    method, plain = PAIRS[name]
    deltas = dense(shape, num_tasks, dtype=dtype)
    merged, doubles = method.merge(deltas), [delta.double() for delta in deltas]
    expected = ties.settled(merged, plain(doubles, None), method, doubles)
    assert error(merged, expected) <= bound(method, dtype)


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("tsv")])
def test_sixty_four_tasks(name: str):
    hold(name, (16, 12), 64, torch.float32)


def test_sixty_four_tasks_with_a_direction_each():
    hold("tsv_m", (96, 72), 64, torch.float32)


@pytest.mark.parametrize("shape", [(100_000, 3), (3, 100_000)], ids=str)
@pytest.mark.parametrize("name", ["drm_h", "drm_v", "drm_individual", "iso_c", "iso_cts", "ties", "average"])
def test_long_and_thin(name: str, shape: tuple[int, int]):
    hold(name, shape, 3, torch.float32)
