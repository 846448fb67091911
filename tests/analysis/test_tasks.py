"""Subsets of tasks, their merges, and t-tests by their formula."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import betainc

from helpers.three_tasks import CLASSES, ThreeTasks
from lightning_drm import DRM, TIES, Average, TaskArithmetic
from lightning_drm.analysis.tasks import NORMALIZED, Tasks, paired_test, subsets
from lightning_drm.fusion import method_title
from lightning_drm.merging import METHODS

BASELINES = [Average(), TaskArithmetic(), DRM("vertical", 0.5)]


@pytest.fixture(scope="module")
def found(three_tasks: ThreeTasks):
    return three_tasks.analyze(Tasks(BASELINES))


def test_every_subset_is_merged_by_every_method_and_measured_on_its_own_tasks(three_tasks: ThreeTasks, found: list):
    table = pd.read_csv(found[0].table).set_index(["tasks", "method"])[NORMALIZED]
    chosen = [subset for size in (2, 3) for subset in itertools.combinations(CLASSES, size)]
    assert len(table) == len(chosen) * 4
    for subset, method in itertools.product(chosen, [DRM(density=0.5), *BASELINES]):
        merged = three_tasks.merged(method, subset)
        expected = sum(three_tasks.normalized(merged, task) for task in subset) / len(subset)
        assert table[", ".join(subset), method_title(method)] == pytest.approx(expected)
    assert len(table.round(6).unique()) > 5, "the case shows nothing"


def t_test(differences: np.ndarray) -> tuple[float, float]:
    """Student's t and P(T > t), by the regularized incomplete beta function."""
    n = len(differences)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(n))
    tail = betainc((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t * t)) / 2
    return t, tail if t > 0 else 1 - tail


def test_tests_are_one_sided_and_paired_by_subset(found: list):
    table = pd.read_csv(found[0].table)
    tests = pd.read_csv(found[1].table, dtype={"number of tasks": str})
    wide = table.pivot(index=["number of tasks", "tasks"], columns="method", values=NORMALIZED)
    own = "DRM, horizontal, density 0.5"
    compared = 0
    for _, row in tests.iterrows():
        part = wide if row["number of tasks"] == "all" else wide.loc[int(row["number of tasks"])]
        differences = (part[own] - part[row["baseline"]]).to_numpy()
        assert row["pairs"] == len(differences)
        assert row["mean difference (fraction)"] == pytest.approx(differences.mean())
        if row["number of tasks"] == "3" or np.ptp(differences) == 0:
            assert np.isnan(row["p, one-sided"])
        else:
            assert (row["t"], row["p, one-sided"]) == pytest.approx(t_test(differences))
            compared += 1
    assert compared >= 3
    assert len(tests) == len(BASELINES) * 3


def test_a_test_of_many_pairs_by_the_formula():
    draws = np.random.default_rng(0)
    first, second = draws.normal(0.02, 0.1, 12), draws.normal(0, 0.1, 12)
    test = paired_test(first, second)
    assert (test.statistic, test.p) == pytest.approx(t_test(first - second))
    assert paired_test(second, first).p == pytest.approx(1 - test.p)
    assert math.isnan(paired_test([0.5], [0.4]).p)
    assert math.isnan(paired_test([0.5, 0.7], [0.5, 0.7]).p)


def test_sentences_have_the_numbers(found: list):
    table = pd.read_csv(found[0].table)
    own = table[table["method"] == "DRM, horizontal, density 0.5"]
    means = own.groupby("number of tasks")[NORMALIZED].mean()
    assert f"{100 * means[2]:.1f} % with 2, {100 * means[3]:.1f} % with 3 tasks" in found[0].sentence
    assert found[1].sentence.startswith("Over 4 subsets, DRM, horizontal, density 0.5 is ")
    assert all(method_title(method) in found[1].sentence for method in BASELINES)


def test_many_subsets_are_drawn_by_the_seed():
    tasks = [f"t{number}" for number in range(12)]
    drawn = subsets(tasks, 5, most=10, seed=1)
    assert drawn == subsets(tasks, 5, most=10, seed=1) != subsets(tasks, 5, most=10, seed=2)
    assert len(set(drawn)) == 10
    assert all(len(set(subset)) == 5 and list(subset) == sorted(subset, key=tasks.index) for subset in drawn)


def test_baselines_are_all_other_methods_or_those_given(three_tasks: ThreeTasks):
    with pytest.raises(ValueError, match=r"tasks: The method DRM, horizontal, density 0\.5 is given twice"):
        three_tasks.analyze(Tasks([DRM(density=0.5)]))
    with pytest.raises(ValueError, match="most_subsets must be 1 or more, got 0"):
        Tasks(most_subsets=0)
    table = three_tasks.table(Tasks(most_subsets=1), TIES(density=0.3))
    names = {title.split(",")[0] for title in table["method"]}
    assert {kind.__name__ for kind in METHODS if kind.needs is None} <= names
    assert not {"RegMean", "Fisher"} & names, "nothing was collected that they need"
    assert list(table.groupby("number of tasks")["tasks"].nunique()) == [1, 1]
