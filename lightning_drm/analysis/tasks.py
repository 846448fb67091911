r"""How methods hold up as more tasks are merged, and whether one of them is better than the others.

The study of Figure 2 and Tables 5 and 6 of arXiv 2505.23117:

1. Of each number of tasks k = 2 … N, take all subsets of k tasks, or some of them at random where there are many.
2. Merge each subset by each method, measure the merge on the subset's tasks, and take the average normalized score

   .. math:: y_{m,S} = \frac{1}{|S|} \sum_{t \in S} \frac{\mathrm{merged}_{m,S}(t)}{\mathrm{individual}(t)}

3. Test for each baseline b whether the configured method is better: a one-sided paired t-test of the differences
   :math:`d_S = y_{m,S} - y_{b,S}`, for each k with two subsets or more, and over all subsets:

   .. math:: t = \frac{\bar d}{s_d / \sqrt{n}}, \qquad p = P(T_{n-1} > t)

Subsets share tasks, so their differences are not independent, and p-values tend to be too small; the paper's are
computed in the same way. Cost: a merge and an evaluation for each subset and method.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.summary import comparison, points
from lightning_drm.evaluation import Candidates, Finding
from lightning_drm.evaluation.figures import heat_map, new_figure, percent, style_of
from lightning_drm.fusion import method_title, problem_of_statistics
from lightning_drm.merging import METHODS, Method

SIGNIFICANT = 0.05

NORMALIZED = "average normalized score (fraction)"

_ALL = "all"
_DIFFERENCE = "mean difference (fraction)"
_P = "p, one-sided"


@dataclass(frozen=True)
class Test:
    """A one-sided paired t-test.

    Attributes:
        difference: The mean difference; above 0 where the first is better.
        statistic: Student's t; NaN where all differences are equal, or there is one.
        p: The probability of such a t, or a higher one, where the first is not better.
        num_pairs: How many pairs there are.
    """

    difference: float
    statistic: float
    p: float
    num_pairs: int


def paired_test(first: Sequence[float], second: Sequence[float]) -> Test:
    """Tests whether the first numbers are higher than the second ones, pair by pair.

    Args:
        first: Numbers.
        second: As many, in the same order.

    Example:
        >>> test = paired_test([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
        >>> test.difference, round(test.statistic, 4), round(test.p, 4)
        (2.0, 3.4641, 0.0371)
    """
    differences = np.subtract(first, second)
    if len(differences) < 2 or np.ptp(differences) == 0:
        return Test(float(differences.mean()), math.nan, math.nan, len(differences))
    result = ttest_rel(first, second, alternative="greater")
    return Test(float(differences.mean()), float(result.statistic), float(result.pvalue), len(differences))


def subsets(tasks: Sequence[str], size: int, most: int, seed: int) -> list[tuple[str, ...]]:
    """All subsets of some size, or as many as are wanted, drawn at random.

    Args:
        tasks: The tasks.
        size: How many of them a subset has.
        most: How many subsets there may be.
        seed: Decides which.

    Example:
        >>> subsets(["a", "b", "c"], 2, most=10, seed=0)
        [('a', 'b'), ('a', 'c'), ('b', 'c')]
        >>> len(set(subsets([str(task) for task in range(20)], 10, most=10, seed=0)))
        10
    """
    if math.comb(len(tasks), size) <= most:
        return list(combinations(tasks, size))
    draw = random.Random(f"{seed}/{size}")
    found: set[tuple[int, ...]] = set()
    while len(found) < most:
        found.add(tuple(sorted(draw.sample(range(len(tasks)), size))))
    return [tuple(tasks[index] for index in chosen) for chosen in sorted(found)]


class Tasks(Analysis):
    """Merging 2 … N tasks with several methods, with t-tests of the configured one against each other.

    Args:
        baselines: The other methods; all of this package, with their defaults, if left out, but for those that need
            statistics which were not collected.
        most_subsets: How many subsets of each size are merged at most.
        seed: Decides which.

    Raises:
        ValueError: If there would be no subset.
    """

    name = "tasks"
    needs_scores = True

    def __init__(self, baselines: Sequence[Method] | None = None, most_subsets: int = 10, seed: int = 0) -> None:
        if most_subsets < 1:
            raise ValueError(f"tasks: most_subsets must be 1 or more, got {most_subsets}.")
        self.baselines = None if baselines is None else list(baselines)
        self.most_subsets = most_subsets
        self.seed = seed

    @override
    def unavailable(self, candidates: Candidates) -> str | None:
        return None if len(candidates.tasks) > 1 else "it merges two tasks or more"

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        titles = [method_title(method) for method in self._methods(candidates)]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        return [f"The method {title} is given twice." for title in twice]

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        methods = {method_title(method): method for method in self._methods(candidates)}
        jobs = [(subset, title) for subset in self._subsets(candidates.tasks) for title in methods]
        measured = []
        for number, (subset, title) in enumerate(jobs, 1):
            recipe = replace(candidates.recipe, method=methods[title])
            merged = candidates.merged(recipe, {task: candidates.vectors[task] for task in subset})
            compared = comparison(candidates, candidates.scores(merged, subset, intervals=False), subset)
            measured.append(
                {
                    "number of tasks": len(subset),
                    "tasks": ", ".join(subset),
                    "method": title,
                    NORMALIZED: compared.normalized["average"],
                }
            )
            on_step(number, len(jobs))
        table = pd.DataFrame(measured).dropna(subset=[NORMALIZED])
        if table.empty:
            raise ValueError("No task has a finetune with a score above 0, by which merged ones could be divided.")
        own, *others = methods
        tests = _tests(table, own, others)
        title = f"Merging 2 to {len(candidates.tasks)} tasks ({own})"
        found = [Finding(self.name, title, _sentence(table, own), table, _figure(table, title))]
        if others:
            title = f"Paired t-tests, merging 2 to {len(candidates.tasks)} tasks ({own})"
            sentence, figure = _sentence_on_tests(tests, own), _figure_of_tests(tests, title)
            found.append(Finding(f"{self.name}_tests", title, sentence, tests, figure))
        return found

    def _methods(self, candidates: Candidates) -> list[Method]:
        """The configured one first."""
        own = candidates.recipe.method
        if self.baselines is not None:
            return [own, *self.baselines]
        vectors = list(candidates.vectors.values())
        others = (kind() for kind in METHODS if kind is not type(own))
        return [own, *(other for other in others if problem_of_statistics(other, vectors) is None)]

    def _subsets(self, tasks: Sequence[str]) -> Iterator[tuple[str, ...]]:
        for size in range(2, len(tasks) + 1):
            yield from subsets(tasks, size, self.most_subsets, self.seed)


def _tests(table: pd.DataFrame, own: str, others: Sequence[str]) -> pd.DataFrame:
    """A row for each baseline and number of tasks, and for all numbers together."""
    wide = table.pivot(index=["number of tasks", "tasks"], columns="method", values=NORMALIZED)
    sizes = wide.index.get_level_values("number of tasks")
    parts = [*((str(size), wide[sizes == size]) for size in sorted(set(sizes))), (_ALL, wide)]
    found = []
    for other in others:
        for size, part in parts:
            test = paired_test(part[own].tolist(), part[other].tolist())
            found.append(
                {
                    "baseline": other,
                    "number of tasks": size,
                    "pairs": test.num_pairs,
                    _DIFFERENCE: test.difference,
                    "t": test.statistic,
                    _P: test.p,
                }
            )
    return pd.DataFrame(found)


def _sentence(table: pd.DataFrame, own: str) -> str:
    means = table.groupby(["number of tasks", "method"])[NORMALIZED].mean().unstack()
    most = means.loc[means.index.max()].sort_values(ascending=False)
    kept = ", ".join(f"{100 * means.loc[size, own]:.1f} % with {size}" for size in means.index)
    return (
        f"{own} keeps this much of the finetunes' scores, on average over subsets: {kept} tasks. Of all "
        f"{means.index.max()} tasks, {most.index[0]} keeps most ({100 * most.iloc[0]:.1f} %), {most.index[-1]} least "
        f"({100 * most.iloc[-1]:.1f} %)."
    )


def _sentence_on_tests(tests: pd.DataFrame, own: str) -> str:
    overall = tests[tests["number of tasks"] == _ALL].sort_values(_P)
    said = [
        (f"{row['baseline']} ({points(row[_DIFFERENCE])}, {_shown(row[_P])})", row[_P] < SIGNIFICANT)
        for _, row in overall.iterrows()
    ]
    better = [text for text, significant in said if significant]
    other = [text for text, significant in said if not significant]
    pairs = overall["pairs"].iloc[0]
    parts = []
    if better:
        parts.append(f"significantly better than {', '.join(better)}")
    if other:
        parts.append(f"not significantly better than {', '.join(other)}")
    return f"Over {pairs} subsets, {own} is {'; '.join(parts)}."


def _shown(p: float) -> str:
    if math.isnan(p):
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _figure(table: pd.DataFrame, title: str) -> Figure:
    figure, (plot,) = new_figure(7.6, 4.6)
    figure.suptitle(title, fontsize=9)
    methods = list(dict.fromkeys(table["method"]))
    for index, method in enumerate(methods):
        style = style_of(index)
        of_method = table[table["method"] == method]
        places = of_method["number of tasks"] + 0.3 * ((index + 0.5) / len(methods) - 0.5)
        plot.scatter(places, of_method[NORMALIZED], s=8, alpha=0.4, color=style["color"], marker=style["marker"])
        means = of_method.groupby("number of tasks")[NORMALIZED].mean()
        width = 2.0 if index == 0 else 1.0
        plot.plot(means.index, means, linewidth=width, color=style["color"], marker=style["marker"], label=method)
    plot.set_xticks(sorted(set(table["number of tasks"])))
    plot.set_xlabel("number of merged tasks (line: mean; points: subsets)")
    percent(plot, "average normalized score")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def _figure_of_tests(tests: pd.DataFrame, title: str) -> Figure:
    sizes = list(dict.fromkeys(tests["number of tasks"]))
    baselines = list(dict.fromkeys(tests["baseline"]))
    cells = tests.set_index(["baseline", "number of tasks"])
    values = [[100 * cells.loc[(baseline, size), _DIFFERENCE] for size in sizes] for baseline in baselines]
    texts = [
        [f"{value:+.1f}\n{_shown(cells.loc[(baseline, size), _P])}" for value, size in zip(row, sizes, strict=True)]
        for row, baseline in zip(values, baselines, strict=True)
    ]
    figure, (plot,) = new_figure(2.6 + 0.9 * len(sizes), 1.4 + 0.45 * len(baselines))
    figure.suptitle(title, fontsize=8)
    heat_map(plot, values, baselines, sizes, texts=texts, around_zero=True)
    plot.set_xlabel("number of merged tasks")
    plot.set_title("mean difference to each baseline (points of the normalized score)", fontsize=8)
    return figure
