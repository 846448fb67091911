"""Many tasks, and matrices that are all but vectors, against the float64 references."""

import pytest
import torch

from helpers import ties
from helpers.devices import on
from merging.test_reference import PAIRS, bound, dense, error


def hold(name: str, shape: tuple[int, int], num_tasks: int, device: torch.device) -> None:
    method, plain = PAIRS[name]
    deltas = dense(shape, num_tasks, dtype=torch.float32)
    merged, doubles = method.merge(on(device, deltas)).cpu(), [delta.double() for delta in deltas]
    expected = ties.settled(merged, plain(doubles, None), method, doubles)
    assert error(merged, expected) <= bound(method, torch.float32, device)


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("tsv")])
def test_sixty_four_tasks(name: str, device: torch.device):
    hold(name, (16, 12), 64, device)


def test_sixty_four_tasks_with_a_direction_each(device: torch.device):
    hold("tsv_m", (96, 72), 64, device)


@pytest.mark.parametrize("shape", [(100_000, 3), (3, 100_000)], ids=str)
@pytest.mark.parametrize("name", ["drm_h", "drm_v", "drm_individual", "iso_c", "iso_cts", "ties", "average"])
def test_long_and_thin(name: str, shape: tuple[int, int], device: torch.device):
    hold(name, shape, 3, device)
