"""Inner products and the subspace alignment ratio against numpy."""

import numpy as np
import pytest
import torch

from lightning_drm import LowRank
from lightning_drm.analysis import overlap
from lightning_drm.analysis.overlap import alignment_ratio, inner_products, leading_directions


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_inner_products_are_those_of_flat_vectors(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "_CHUNK", 5)
    tasks = [random(*shape, seed=seed) for seed in range(3)]
    flat = np.stack([task.numpy().ravel() for task in tasks])
    np.testing.assert_allclose(inner_products(tasks), flat @ flat.T, rtol=1e-12)


def test_factors_have_the_inner_products_of_their_products():
    tasks = [LowRank(random(6, rank, seed=rank), random(rank, 5, seed=9)) for rank in (1, 2, 4)]
    flat = np.stack([(task.up.numpy() @ task.down.numpy()).ravel() for task in tasks])
    np.testing.assert_allclose(inner_products(tasks), flat @ flat.T, rtol=1e-12)
    np.testing.assert_allclose(inner_products([tasks[0], tasks[1].dense()]), (flat @ flat.T)[:2, :2], rtol=1e-12)


@pytest.mark.parametrize("shape", [(8, 15), (15, 8)])
@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.9])
def test_directions_are_the_fewest_that_leave_so_little(shape: tuple[int, int], error: float):
    merged = random(*shape, seed=0) * torch.logspace(0, -3, shape[1], dtype=torch.float64)
    directions, matrix = leading_directions(merged, error).numpy(), merged.numpy()
    left, _, _ = np.linalg.svd(matrix, full_matrices=False)

    def left_over(count: int) -> float:
        part = left[:, :count]
        return np.linalg.norm(matrix - part @ part.T @ matrix) / np.linalg.norm(matrix)

    count = next(count for count in range(9) if left_over(count) <= max(error, 1e-12))
    assert directions.shape == (shape[0], count)
    np.testing.assert_allclose(directions @ directions.T, left[:, :count] @ left[:, :count].T, atol=1e-9)


def test_ratio_is_the_projected_share_of_the_norm():
    delta, merged = random(10, 6, seed=1), random(10, 6, seed=2)
    left = np.linalg.svd(merged.numpy())[0][:, :3]
    plain = np.linalg.norm(left @ left.T @ delta.numpy()) / np.linalg.norm(delta.numpy())
    assert alignment_ratio(torch.from_numpy(left), delta) == pytest.approx(plain, rel=1e-12)
    factors = LowRank(delta, torch.eye(6, dtype=torch.float64))
    assert alignment_ratio(torch.from_numpy(left), factors) == pytest.approx(plain, rel=1e-12)


def test_a_merge_is_aligned_with_itself_up_to_the_error():
    merged = random(12, 9, seed=3)
    assert np.sqrt(1 - 0.3**2) <= alignment_ratio(leading_directions(merged, 0.3), merged) < 1
    assert np.isnan(alignment_ratio(leading_directions(merged), torch.zeros(12, 9)))
