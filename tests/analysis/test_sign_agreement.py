"""Sign agreement against plain loops, and its chance level against all patterns of signs."""

from itertools import product

import numpy as np
import pytest
import torch

from helpers.analyzed import TASKS, deltas, table
from helpers.run import Run
from lightning_drm.analysis.sign_agreement import agreement, agreement_by_chance, count_votes


def agreements(tasks: list[np.ndarray]) -> list[tuple[int, float]]:
    """Number of entries and agreement at every position that has one, by a plain loop."""
    found = []
    for values in zip(*(task.ravel() for task in tasks), strict=True):
        signs = [np.sign(value) for value in values if value != 0]
        if signs:
            found.append((len(signs), max(signs.count(1), signs.count(-1)) / len(signs)))
    return found


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_average_is_that_of_a_plain_loop(num_tasks: int):
    draws = np.random.default_rng(num_tasks)
    tasks = [draws.standard_normal((7, 9)) * (draws.random((7, 9)) < 0.4) for _ in range(num_tasks)]
    votes = count_votes([torch.from_numpy(task) for task in tasks])
    plain = agreements(tasks)
    assert agreement(votes) == pytest.approx(np.mean([share for _, share in plain]), abs=1e-12)
    several = [share for entries, share in plain if entries > 1]
    assert agreement(votes, fewest=2) == pytest.approx(np.mean(several) if several else np.nan, abs=1e-12, nan_ok=True)
    assert votes.sum() == 63


def test_chance_is_the_average_over_all_patterns_of_signs():
    sizes = [1, 1, 2, 3, 3, 5]  # entries of six positions
    votes = np.zeros((6, 6), dtype=np.int64)
    for size in sizes:
        votes[size, size] += 1
    plain = [
        np.mean([max(sum(pattern), size - sum(pattern)) / size for pattern in product([0, 1], repeat=size)])
        for size in sizes
    ]
    assert agreement_by_chance(votes) == pytest.approx(np.mean(plain), abs=1e-12)


def test_nothing_left_is_no_agreement():
    assert np.isnan(agreement(count_votes([torch.zeros(3), torch.zeros(3)])))


def test_the_table_is_that_of_the_stored_deltas(analyzed: Run):
    found = table(analyzed, "sign_agreement").set_index(["matrix", "form"])
    total = {form: [] for form in found.index.unique("form")}
    for name, tasks in deltas(analyzed, "matrix").items():
        for form, tensors in plain_forms(tasks).items():
            plain = agreements(tensors)
            total[form] += plain
            row = found.loc[(name, form)]
            assert row["agreement (fraction)"] == pytest.approx(np.mean([share for _, share in plain]), abs=1e-12)
            assert row["positions with one entry"] == sum(entries == 1 for entries, _ in plain)
            assert row["positions"] - row["positions without an entry"] == len(plain)
    for form, plain in total.items():
        row = found.loc[("all matrices", form)]
        assert row["agreement (fraction)"] == pytest.approx(np.mean([share for _, share in plain]), abs=1e-12)
        assert row["agreement in 0.95 to 1.00 (fraction)"] == pytest.approx(
            np.mean([share == 1 for _, share in plain]), abs=1e-12
        )
        assert row.filter(like="agreement in").sum() == pytest.approx(1, abs=1e-12)


def plain_forms(tasks: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The five forms of a matrix under horizontal DRM of density 0.2, in float64."""
    basis, sigma, _ = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    basis = basis[:, sigma > 1e-2 * sigma[0]]
    rows = [basis.T @ task for task in tasks]
    units = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]
    limit = kth_smallest(np.stack(units))
    kept = [np.where(np.abs(unit) >= limit, row, 0) for unit, row in zip(units, rows, strict=True)]
    assert len(tasks) == len(TASKS)
    return {
        "original": tasks,
        "original, pruned": [np.where(np.abs(task) >= kth_smallest(task), task, 0) for task in tasks],
        "joint": rows,
        "joint, pruned": kept,
        "projected back": [basis @ row for row in kept],
    }


def kth_smallest(values: np.ndarray) -> float:
    """The magnitude below which entries are pruned at density 0.2."""
    return np.sort(np.abs(values).ravel())[values.size - round(0.2 * values.size) - 1]
