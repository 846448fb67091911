"""Decompositions through the Gram matrix."""

import pytest
import torch

from helpers.matrices import matrix
from lightning_drm.merging.linalg.spectral import gram, thin_svd


@pytest.mark.parametrize("shape", [(5, 40), (384, 9), (385, 9), (768, 9), (769, 9), (1153, 9), (9, 5000)])
def test_gram_has_the_upper_triangle(shape):
    a, _ = matrix(*shape)
    b, _ = matrix(shape[0], 3)
    torch.testing.assert_close(gram([a, b]).triu(), (a @ a.T + b @ b.T).triu())


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20)])
@pytest.mark.parametrize("decay", [0.0, 3.0, 10.0])
def test_singular_values_of_doubles_over_ten_orders(shape, decay):
    a, S = matrix(*shape, decay=decay)
    U, found, Vh = thin_svd(a)
    torch.testing.assert_close(found, S, rtol=1e-4, atol=0)
    torch.testing.assert_close(U * found @ Vh, a, rtol=0, atol=1e-13)
    torch.testing.assert_close(U.T @ U, torch.eye(len(S), dtype=torch.float64), rtol=0, atol=1e-6)


def test_numerical_rank():
    a, _ = matrix(30, 50, decay=2)
    U, S, Vh = thin_svd(torch.cat([a, a @ a.T @ a]))
    assert (U.shape, S.shape, Vh.shape) == ((60, 30), (30,), (30, 50))
    assert thin_svd(torch.zeros(4, 6))[1].shape == (0,)
    assert thin_svd(a, 7)[1].shape == (7,)
    assert thin_svd(a, floor=0.5)[1].min() > 0.5
