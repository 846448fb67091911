"""Draws by tensors are those that numpy makes."""

import numpy as np
import pytest

from lightning_drm.merging.draws import Draws, random_raw


@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 100_001])
def test_numbers_are_those_of_numpy(device, count):
    for seed in range(20):
        generator = np.random.PCG64DXSM(seed)
        generator.advance(seed * 12345678901234567890)
        state = generator.state["state"]
        found = random_raw(state["state"], state["inc"], count, device).cpu().numpy().view(np.uint64)
        np.testing.assert_array_equal(found, generator.random_raw(count))


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 1.0])
def test_both_keep_the_same_entries_in_turns(device, density):
    by_numpy, by_tensors = (Draws(3, "task/weight", density, start=10) for _ in range(2))
    for count in (2, 1000, 4, 77):
        np.testing.assert_array_equal(by_tensors.kept_on(device, count).cpu().numpy(), by_numpy.kept(count))
    mixed, again = (Draws(3, "task/weight", density) for _ in range(2))
    found = np.concatenate([mixed.kept_on(device, 50).cpu(), mixed.kept(50), mixed.kept_on(device, 50).cpu()])
    np.testing.assert_array_equal(found, again.kept(150))
