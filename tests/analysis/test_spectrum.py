"""Singular values, ranks and bounds against numpy's SVD."""

import numpy as np
import pytest
import torch

from helpers.analyzed import TASKS, deltas, table
from helpers.run import Run
from lightning_drm import LowRank
from lightning_drm.analysis.spectrum import Spectra


def singular(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_are_those_of_an_svd(direction: str, shape: tuple[int, int], dtype: torch.dtype):
    draws = torch.Generator().manual_seed(0)
    tasks = [torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) for _ in range(3)]
    plain = [task.double().numpy() for task in tasks]
    spectra = Spectra.of(tasks, direction)
    for found, task in zip(spectra.tasks, plain, strict=True):
        np.testing.assert_allclose(found, singular(task), rtol=1e-10)
    joint = singular(np.concatenate(plain, axis=1 if direction == "horizontal" else 0))
    np.testing.assert_allclose(spectra.joint, joint, rtol=1e-10)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_factors_have_the_singular_values_of_their_product(direction: str):
    draws = torch.Generator().manual_seed(1)
    tasks = [LowRank(torch.randn(30, 2, generator=draws), torch.randn(2, 20, generator=draws)) for _ in range(3)]
    plain = [task.up.double().numpy() @ task.down.double().numpy() for task in tasks]
    spectra = Spectra.of(tasks, direction)
    for found, task in zip(spectra.tasks, plain, strict=True):
        np.testing.assert_allclose(found[:2], singular(task)[:2], rtol=1e-10)
        assert (found[2:] < 1e-10).all()
    joint = singular(np.concatenate(plain, axis=1 if direction == "horizontal" else 0))
    np.testing.assert_allclose(spectra.joint[:6], joint[:6], rtol=1e-10)


def test_slacks_are_those_of_the_bounds_as_they_are_written():
    draws = np.random.default_rng(2)
    tasks = [size * draws.standard_normal((6, 4)) for size in (1.0, 0.5, 2.0)]
    values, joint = [np.append(singular(task), [0, 0]) for task in tasks], singular(np.concatenate(tasks, axis=1))
    first = min(joint[i] - values[t][i] for t in range(3) for i in range(6)) / joint[0]
    second = (
        min(
            values[t][i] ** 2 + sum(values[s][0] ** 2 for s in range(3) if s != t) - joint[i] ** 2
            for t in range(3)
            for i in range(6)
        )
        / joint[0] ** 2
    )
    found = Spectra.of([torch.from_numpy(task) for task in tasks], "horizontal").smallest_slacks()
    assert found == pytest.approx((first, second), abs=1e-12)
    assert min(found) > 0


def test_bounds_are_tight_where_they_can_be():
    eye, zero = torch.eye(3), torch.zeros(3, 3)
    assert Spectra.of([eye, zero], "horizontal").smallest_slacks() == pytest.approx((0, 0), abs=1e-12)
    assert Spectra.of([zero, zero], "horizontal").smallest_slacks() == (0, 0)


def test_tables_are_those_of_the_stored_deltas(analyzed: Run):
    ranks = table(analyzed, "spectrum_ranks").set_index(["matrix", "of"])
    values = table(analyzed, "spectrum").set_index(["matrix", "of"])["singular value"]
    named = deltas(analyzed, "matrix")
    assert set(ranks.index.unique("matrix")) == set(named)
    assert len(values.index.unique("matrix")) == 3
    for name, tasks in named.items():
        for owner, matrix in zip([*TASKS, "joint"], [*tasks, np.concatenate(tasks, axis=1)], strict=True):
            plain, row = singular(matrix), ranks.loc[(name, owner)]
            kept = plain > 1e-2 * plain[0]
            assert row["rank kept by rank_tol"] == kept.sum()
            assert row["energy kept by rank_tol (fraction)"] == pytest.approx(
                (plain[kept] ** 2).sum() / (plain**2).sum(), rel=1e-9
            )
            assert row["largest singular value"] == pytest.approx(plain[0], rel=1e-9)
            assert row["stable rank"] == pytest.approx(np.linalg.norm(matrix) ** 2 / plain[0] ** 2, rel=1e-9)
            assert row["numerical rank"] == np.linalg.matrix_rank(matrix, tol=1e-6 * plain[0])
            if name in values.index.unique("matrix"):
                np.testing.assert_allclose(values.loc[(name, owner)], plain, atol=1e-7 * plain[0])
