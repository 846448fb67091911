"""What pruning takes from each row of the joint basis, against a plain SVD in float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from helpers.analyzed import deltas, table
from helpers.run import Run
from lightning_drm import DRM
from lightning_drm.analysis.pruning_profile import PruningProfile, dropped_shares


def plain_shares(tasks: list[NDArray[np.float64]], density: float, renormalize: bool) -> NDArray[np.float64]:
    """Share dropped of each task's rows, step by step as the paper has it."""
    _, sigma, rows = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    parts = np.split(rows[sigma > 1e-2 * sigma[0]], len(tasks), axis=1)
    if renormalize:
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    magnitudes = np.sort(np.abs(np.stack(parts)).ravel())
    limit = magnitudes[len(magnitudes) - round(len(magnitudes) * density) - 1]
    return np.array([(np.abs(part) < limit).mean(axis=1) for part in parts])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_shares_are_those_of_a_plain_decomposition(direction: str, renormalize: bool):
    draws = np.random.default_rng(0)
    tasks = [size * draws.standard_normal((9, 14)) for size in (1.0, 0.2, 5.0)]
    method = DRM(direction=direction, density=0.4, renormalize=renormalize)
    found = dropped_shares(method.pruned(method.prepare([torch.from_numpy(task) for task in tasks])))
    sides = [task.T for task in tasks] if direction == "vertical" else tasks
    np.testing.assert_allclose(found, plain_shares(sides, 0.4, renormalize), atol=1e-12)


def test_the_rows_of_a_small_task_vanish_without_renormalization_only():
    draws = np.random.default_rng(1)
    tasks = [torch.from_numpy(size * draws.standard_normal((6, 20))) for size in (1.0, 0.01)]
    with_it, without = (
        dropped_shares(method.pruned(method.prepare(tasks)))
        for method in (DRM(density=0.3), DRM(density=0.3, renormalize=False))
    )
    assert (without[1] == 1).all()
    assert (with_it[1] < 0.95).all()


def test_the_table_is_that_of_the_stored_deltas(analyzed: Run):
    found = table(analyzed, "pruning_profile")
    (layer,) = found["layer"].unique()
    assert layer == "model.encoder.encoder.layer.1.attention.output.dense.weight"  # the seventh of twelve in depth
    tasks = deltas(analyzed)[layer]
    for (pruned, renormalized), rows in found.groupby(["pruned (fraction)", "renormalized"]):
        shares = rows.pivot(index="task", columns="row", values="dropped (fraction of the row)").sort_index()
        np.testing.assert_allclose(shares, plain_shares(tasks, 1 - pruned, renormalized), atol=1e-12)
    assert set(found["pruned (fraction)"].round(6)) == {0.5, 0.8}


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"dropped must be above 0 and below 1, got 1\.5"):
        PruningProfile(dropped=1.5)
