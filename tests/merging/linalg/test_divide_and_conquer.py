"""Eigenvectors by tearing, against their definition and LAPACK's solver for everything at once."""

import numpy as np
import pytest
import torch
from helpers import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_drm.merging import DRM
from lightning_drm.merging.linalg import spectral
from lightning_drm.merging.linalg.divide_and_conquer import LinAlgError, leading_eigenvectors
from lightning_drm.merging.linalg.spectral import eigen

EPS = torch.finfo(torch.float64).eps
SINGLE = 5e-6  # products of float32 matrices of a thousand rows


def check(matrix: torch.Tensor, count: int | None = None) -> None:
    """Values are eigenvalues, vectors are orthonormal and belong to them."""
    size, norm = len(matrix), float(torch.linalg.matrix_norm(matrix, 2))
    kept = size if count is None else count
    values, vectors = leading_eigenvectors(matrix.triu(), lambda values: kept)
    expected = torch.from_numpy(np.linalg.eigvalsh(matrix.numpy())).flip(0)
    torch.testing.assert_close(values, expected, rtol=0, atol=4 * size * EPS * norm)
    assert vectors.shape == (size, kept)
    assert vectors.dtype == torch.float32
    double = vectors.double()
    torch.testing.assert_close(double.T @ double, torch.eye(kept, dtype=torch.float64), rtol=0, atol=SINGLE)
    torch.testing.assert_close(matrix @ double, double * values[:kept], rtol=0, atol=SINGLE * norm)


def gram(size: int, rank: int, decay: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(size + rank)
    S = torch.randn(size, rank, generator=g, dtype=torch.float64) * torch.logspace(0, -decay, rank, dtype=torch.float64)
    return S @ S.T


def rotated(values: list[float]) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))[0]
    return (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize("size", [4, 5, 61, 300])
@pytest.mark.parametrize("share", [2.0, 0.5, 0.02])
@pytest.mark.parametrize("decay", [0.0, 8.0])
def test_full_and_low_rank(size, share, decay):
    check(gram(size, max(1, round(share * size)), decay))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(50, dtype=torch.float64),
        1e-30 * gram(30, 40),
        1e60 * gram(30, 40),
        torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)),
        torch.diag(torch.arange(40, dtype=torch.float64)),
        torch.ones(30, 30, dtype=torch.float64),
        torch.zeros(30, 30, dtype=torch.float64),
        rotated([9.0] * 3 + [2.0] * 40 + [1.0] * 57),
        rotated([1 + 1e-15 * i for i in range(60)]),
        rotated([2.0**-i for i in range(80)]),
        # Wilkinson's: tridiagonal, and its eigenvalues come in pairs that no double can tell apart.
        torch.diag((torch.arange(41, dtype=torch.float64) - 20).abs())
        + torch.diag(torch.ones(40, dtype=torch.float64), 1)
        + torch.diag(torch.ones(40, dtype=torch.float64), -1),
    ],
    ids=[
        "identity",
        "tiny",
        "beyond float32",
        "one",
        "diagonal",
        "ones",
        "zeros",
        "clusters",
        "one cluster",
        "graded",
        "Wilkinson",
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_scale_and_eigenvalues_that_coincide_or_vanish(matrix):
    check(matrix)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.sampled_from([0.0, 1e-9, 1.0, 1.0 + 1e-12, 3.0]), min_size=4, max_size=24).filter(any))
def test_any_multiplicities(values):
    check(rotated(values))


@pytest.mark.parametrize("count", [0, 1, 7, 61])
def test_only_what_is_kept(count):
    check(gram(61, 80), count)


def test_takes_the_memory_of_its_input():
    matrix = gram(20, 30)
    leading_eigenvectors(matrix, len)
    assert matrix.numel() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    with pytest.raises(LinAlgError, match="not finite"):
        leading_eigenvectors(torch.full((6, 6), value, dtype=torch.float64), len)


def test_a_root_that_is_not_found():
    """Two blocks that only rounding couples, the larger eigenvalues in the block that is cut off."""
    beside = torch.tensor([1, 1, 0, 1e-17], dtype=torch.float64)
    with pytest.raises(LinAlgError, match="root 4 of the secular equation"):
        leading_eigenvectors(
            torch.diag(torch.tensor([0, 1, 0, 1, 1], dtype=torch.float64)) + torch.diag(beside, 1), len
        )


def test_the_default_dtype_changes_nothing():
    deltas = [torch.randn(1030, 600, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = DRM().merge(deltas)
    torch.set_default_dtype(torch.float64)
    try:
        found = DRM().merge(deltas)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_layer_that_was_not_trained():
    assert not DRM().merge([torch.zeros(1030, 520)] * 2).any()


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_a_tall_layer_is_merged_as_by_the_svd_in_doubles(direction):
    g = torch.Generator().manual_seed(0)
    shape = (1100, 400) if direction == "horizontal" else (400, 1100)
    deltas = [torch.randn(shape, generator=g) * torch.linspace(1, 0.1, shape[1]) for _ in range(3)]
    merged = DRM(direction).merge(deltas).double()
    expected = reference.drm([delta.double() for delta in deltas], None, direction)
    # An entry that is as large as the threshold, or a vote that is a draw, to rounding, changes one column of U M.
    errors = torch.linalg.norm(merged - expected, dim=0 if direction == "horizontal" else 1)
    typical = torch.linalg.norm(expected) / len(errors) ** 0.5
    assert (errors < 2e-6 * typical).double().mean() > 0.97
    assert errors.max() < 0.05 * typical


def test_another_solver_takes_over(monkeypatch):
    matrix = gram(spectral.TORN_SIZE, 20)
    values, vectors = eigen(matrix.clone, torch.float32, lambda values: 20)
    calls = []

    def fail(matrix, num_kept):
        calls.append(len(matrix))
        matrix.zero_()
        raise LinAlgError("did not converge")

    monkeypatch.setattr(spectral, "leading_eigenvectors", fail)
    again, others = eigen(matrix.clone, torch.float32, lambda values: 20)
    assert calls == [spectral.TORN_SIZE]
    torch.testing.assert_close(again, values, rtol=0, atol=1e-12 * float(values[0]))
    torch.testing.assert_close((others.T @ vectors).abs(), torch.eye(20), rtol=0, atol=1e-4)
