"""Decompositions through the Gram matrix, and what happens when a solver fails."""

import pytest
import torch
from helpers import ties

from lightning_drm.merging import DRM
from lightning_drm.merging.linalg.spectral import eigen, gram, orthogonalize, thin_svd


def matrix(m, n, dtype=torch.float64, decay=0.0):
    g = torch.Generator().manual_seed(m * n)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))[0]
    S = torch.logspace(0, -decay, min(m, n), dtype=torch.float64)
    return (U * S @ V.T).to(dtype), S


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


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_polar_factor(shape):
    a, _ = matrix(*shape, decay=2)
    U, _, Vh = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(orthogonalize(a), U @ Vh)


class TestLadder:
    gram = gram([matrix(6, 9)[0]])

    def fail(self, matrix, **_):
        matrix.zero_()  # a solver that gives up leaves nothing of its input
        raise torch.linalg.LinAlgError("did not converge")

    def test_next_solver_takes_over(self, monkeypatch):
        values, vectors = eigen(self.gram.clone)
        monkeypatch.setattr(torch.linalg, "eigh", self.fail)
        again, rotated = eigen(self.gram.clone)
        torch.testing.assert_close(again, values)
        full = self.gram.triu() + self.gram.triu(1).T
        torch.testing.assert_close(rotated * again @ rotated.T, full)
        torch.testing.assert_close(vectors * values @ vectors.T, full)

    def test_output_that_is_not_finite_counts_as_failure(self, monkeypatch):
        monkeypatch.setattr(torch.linalg, "eigh", lambda matrix, out, **_: out[0].fill_(float("nan")))
        torch.testing.assert_close(eigen(self.gram.clone)[0].sum(), self.gram.trace())

    def test_vectors_that_are_not_orthonormal_count_as_failure(self, monkeypatch):
        values, vectors = eigen(self.gram.clone)
        solve, calls = torch.linalg.eigh, []

        def first_bends_two_vectors(matrix, out, **options):
            solve(matrix, out=out, **options)
            if not calls:
                out[1][:, 2] += 1e-3 * out[1][:, 4]
            calls.append(len(matrix))

        monkeypatch.setattr(torch.linalg, "eigh", first_bends_two_vectors)
        again, rotated = eigen(self.gram.clone)
        assert calls == [6, 6]
        assert torch.equal(again, values)
        assert torch.equal(rotated, vectors)

    def test_error_names_the_size_when_nothing_converges(self, monkeypatch):
        monkeypatch.setattr(torch.linalg, "eigh", self.fail)
        monkeypatch.setattr(torch.linalg, "svd", self.fail)
        with pytest.raises(ArithmeticError, match=r"\(6, 6\)"):
            eigen(self.gram.clone)

    def test_drm_merges_without_eigh(self, monkeypatch):
        deltas = [matrix(12, 15, decay=1)[0], matrix(15, 12, decay=0.5)[0].T]
        expected = DRM().merge(deltas)
        monkeypatch.setattr(torch.linalg, "eigh", self.fail)
        merged = DRM().merge(deltas)
        torch.testing.assert_close(merged, ties.settled(merged, expected, DRM(), deltas))
