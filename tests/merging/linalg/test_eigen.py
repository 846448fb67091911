"""Eigenvectors, and what happens when a solver fails or is wrong."""

import pytest
import torch

from helpers import ties
from helpers.matrices import matrix
from lightning_drm.merging import DRM
from lightning_drm.merging.linalg.eigen import eigen
from lightning_drm.merging.linalg.spectral import gram


@pytest.mark.parametrize("size", [1, 2, 511, 513, 1100])
def test_a_matrix_of_which_the_upper_triangle_is_read(size):
    a, _ = matrix(size, size, decay=2)
    full = a @ a.T
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tril(-1)
    values, vectors = eigen(lambda: full.triu() + noise)
    torch.testing.assert_close(vectors * values @ vectors.T, full, rtol=0, atol=1e-13)
    assert values.diff().max() <= 0 if size > 1 else len(values) == 1


@pytest.mark.parametrize("exponent", [-250, 0, 250])
def test_of_any_scale(exponent):
    full = gram([matrix(40, 60, decay=3)[0]]) * 2.0**exponent
    values, _ = eigen(full.clone)
    torch.testing.assert_close(values.sum(), full.trace())


BENT = torch.tensor([[1.0, 0.0], [1e-3, 1.0]], dtype=torch.float64)
TURNED = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)  # orthonormal still, as in PyTorch's issue 192483


class TestLadder:
    gram = gram([matrix(6, 9, decay=1)[0]])

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

    @pytest.mark.parametrize("turn", [BENT, TURNED], ids=["not orthonormal", "of another matrix"])
    def test_wrong_vectors_count_as_failure(self, monkeypatch, turn):
        values, vectors = eigen(self.gram.clone)
        solve, calls = torch.linalg.eigh, []

        def first_turns_two_vectors(matrix, out, **options):
            solve(matrix, out=out, **options)
            if not calls:
                out[1][:, [2, 4]] = out[1][:, [2, 4]] @ turn
            calls.append(len(matrix))

        monkeypatch.setattr(torch.linalg, "eigh", first_turns_two_vectors)
        again, rotated = eigen(self.gram.clone)
        assert calls == [6, 6]
        assert torch.equal(again, values)
        assert torch.equal(rotated, vectors)

    def test_a_device_without_memory_counts_as_failure(self, monkeypatch):
        solve, calls = torch.linalg.eigh, []

        def first_has_no_memory(matrix, out, **options):
            calls.append(len(matrix))
            if len(calls) == 1:
                matrix.zero_()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            solve(matrix, out=out, **options)

        monkeypatch.setattr(torch.linalg, "eigh", first_has_no_memory)
        values, _ = eigen(self.gram.clone)
        assert calls == [6, 6]
        torch.testing.assert_close(values.sum(), self.gram.trace())

    def test_memory_that_is_short_once_is_asked_for_again(self):
        calls = []

        def build():
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.gram.clone()

        torch.testing.assert_close(eigen(build)[0].sum(), self.gram.trace())

    def test_error_names_the_size_when_nothing_converges(self, monkeypatch):
        monkeypatch.setattr(torch.linalg, "eigh", self.fail)
        monkeypatch.setattr(torch.linalg, "svd", self.fail)
        with pytest.raises(
            ArithmeticError, match=r"\(6, 6\) Gram matrix: did not converge; did not converge; did not converge$"
        ):
            eigen(self.gram.clone)

    def test_drm_merges_without_eigh(self, monkeypatch):
        deltas = [matrix(12, 15, decay=1)[0], matrix(15, 12, decay=0.5)[0].T]
        expected = DRM().merge(deltas)
        monkeypatch.setattr(torch.linalg, "eigh", self.fail)
        merged = DRM().merge(deltas)
        torch.testing.assert_close(merged, ties.settled(merged, expected, DRM(), deltas))
