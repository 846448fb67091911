"""The polar factor, by decomposition and by products only."""

import pytest
import torch

from helpers.matrices import matrix
from lightning_drm.merging.linalg.polar import newton_schulz, orthogonalize, polar


def by_svd(a):
    U, S, Vh = torch.linalg.svd(a.double(), full_matrices=False)
    return U @ Vh, S.mean()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_by_decomposition(shape):
    a, _ = matrix(*shape, decay=2)
    factor, mean = polar(a)
    expected, expected_mean = by_svd(a)
    torch.testing.assert_close(factor, expected)
    torch.testing.assert_close(mean, expected_mean)
    assert torch.equal(orthogonalize(a), factor)


@pytest.mark.parametrize("shape", [(0, 3), (3, 4)])
def test_of_zeros(shape):
    factor, mean = polar(torch.zeros(shape))
    assert torch.equal(factor, torch.zeros(shape))
    assert mean == 0


@pytest.mark.parametrize("shape", [(60, 60), (60, 200), (200, 60)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_by_products_only(shape, decay):
    a, _ = matrix(*shape, decay=decay)
    torch.testing.assert_close(newton_schulz(a), by_svd(a)[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(newton_schulz(a.float()).float(), by_svd(a.float())[0].float(), rtol=0, atol=3e-7)


def test_by_products_only_of_bases_side_by_side():
    """What Iso-CTS and TSV-M hand over: orthonormal vectors of each task, which are far from those of the others."""
    bases = [torch.linalg.qr(matrix(96, 12, decay=task / 3)[0])[0] for task in range(8)]
    basis = torch.cat([base + 0.1 * torch.randn(96, 12, generator=torch.Generator().manual_seed(task))
                       for task, base in enumerate(bases)], dim=1)  # fmt: skip
    torch.testing.assert_close(newton_schulz(basis), by_svd(basis)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(520, 640), (640, 520)])
@pytest.mark.parametrize("decay", [1.0, 8.0], ids=["full rank", "nearly deficient"])
def test_of_a_size_that_accelerators_take_by_products(device, shape, decay):
    """Where these give up, it is the decomposition's."""
    a, _ = matrix(*shape, dtype=torch.float32, decay=decay)
    (expected, expected_mean), (found, mean) = polar(a), polar(a.to(device))
    assert torch.linalg.matrix_norm(found.cpu() - expected) <= 3e-4 * torch.linalg.matrix_norm(expected)
    torch.testing.assert_close(mean.cpu(), expected_mean)


@pytest.mark.parametrize("exponent", [-200, 200])
def test_by_products_only_of_any_scale(exponent):
    a, _ = matrix(20, 30, decay=1)
    torch.testing.assert_close(newton_schulz(a * 2.0**exponent), newton_schulz(a))


@pytest.mark.parametrize("rank", [0, 1, 29])
def test_products_only_find_no_factor_where_ranks_are_deficient(rank):
    a, _ = matrix(30, 50)
    U, S, Vh = torch.linalg.svd(a, full_matrices=False)
    assert newton_schulz(U[:, :rank] * S[:rank] @ Vh[:rank]) is None


def test_products_only_give_up_on_singular_values_that_are_too_small():
    assert newton_schulz(matrix(30, 50, decay=6)[0]) is None
