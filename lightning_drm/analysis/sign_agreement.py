r"""How much tasks agree in sign: in the original space, in DRM's joint space, and projected back from there.

The study of Table 4, Figure 5 and appendix F of arXiv 2505.23117. At a position where c₊ tasks have a positive entry
and c₋ a negative one, the agreement is the majority's share of the k = c₊ + c₋ tasks that have an entry:

.. math:: a = \frac{\max(c_+, c_-)}{c_+ + c_-} \in [0.5, 1]

1. Take each matrix in five forms: the deltas :math:`D_t` as they are; pruned in the original space, each task by a
   threshold of its own, as TIES prunes; the rows :math:`U^T D_t` in the joint basis as they are; pruned there, as DRM
   prunes, :math:`P_t`; and these projected back, :math:`U P_t`.
2. Count positions by (k, majority).
3. Average the agreement over all positions with k ≥ 1, of one matrix or of all.

A position that only one task has agrees fully, a = 1, and counts. Pruning makes many such positions, so agreement rises
with every pruning, whatever the space. Two further numbers tell this apart: the agreement where at least two tasks have
an entry, and the one that independent, fair signs would give on average,

.. math:: c(k) = \sum_{j=0}^{k} \binom{k}{j} 2^{-k} \frac{\max(j, k - j)}{k}

with the same numbers of entries k. A matrix that is projected back is dense: compare it with the deltas as they are.

Cost: one decomposition for each matrix, and a few looks at each entry. Memory: a few copies of one parameter of all
tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import comb

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.matrices import Matrices, drm_of
from lightning_drm.evaluation import Candidates, Finding
from lightning_drm.evaluation.figures import COLORS, new_figure, percent
from lightning_drm.fusion import method_title
from lightning_drm.merging import DRM, Delta
from lightning_drm.merging.linalg.selection import prune_each, thresholds
from lightning_drm.merging.low_rank import densify

Votes = NDArray[np.int64]
"""How many positions have k entries (row) of which so many have the majority's sign (column), (N + 1, N + 1)."""

ORIGINAL, ORIGINAL_PRUNED = "original", "original, pruned"
JOINT, JOINT_PRUNED = "joint", "joint, pruned"
PROJECTED = "projected back"
FORMS = (ORIGINAL, ORIGINAL_PRUNED, JOINT, JOINT_PRUNED, PROJECTED)

ALL = "all matrices"

EDGES = np.linspace(0.5, 1.0, 11)
"""Of the histogram's ranges."""


def count_votes(tasks: Sequence[Tensor]) -> Votes:
    """Counts the positions of N tensors of one shape by how many tasks have an entry and how many of these agree.

    Args:
        tasks: N tensors of one shape.

    Example:
        One position has entries 1 and 2, one has 3 and −4, and one has 5 alone.

        >>> count_votes([torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, -4.0, 5.0])])
        array([[0, 0, 0],
               [0, 1, 0],
               [0, 1, 1]])
    """
    size = len(tasks) + 1
    positive, negative = (torch.zeros(tasks[0].shape, dtype=torch.int32) for _ in range(2))
    for task in tasks:
        positive += task > 0
        negative += task < 0
    codes = (positive + negative) * size + torch.maximum(positive, negative)
    return torch.bincount(codes.flatten(), minlength=size**2).reshape(size, size).numpy()


def agreement(votes: Votes, fewest: int = 1) -> float:
    """The average agreement over positions.

    Args:
        votes: What `count_votes` gave, or a sum of these.
        fewest: How many entries a position must have to count.

    Returns:
        The average, from 0.5 to 1; NaN where no position counts.

    Example:
        Of the positions of `count_votes`, agreement is 1, 0.5 and 1.

        >>> votes = count_votes([torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, -4.0, 5.0])])
        >>> round(agreement(votes), 4), agreement(votes, fewest=2)
        (0.8333, 0.75)
    """
    entries, majority = _axes(votes)
    counted = entries >= fewest
    return _mean(majority[counted] / entries[counted], votes[counted])


def agreement_by_chance(votes: Votes) -> float:
    """The average agreement that independent, fair signs would give, with the same numbers of entries.

    Args:
        votes: What `count_votes` gave, or a sum of these.

    Example:
        Two entries agree half of the time: c(1) = 1, c(2) = 0.75.

        >>> float(agreement_by_chance(np.array([[7, 0, 0], [0, 2, 0], [0, 1, 1]])))
        0.875
    """
    entries = np.arange(1, len(votes))
    chance = [sum(comb(k, j) * max(j, k - j) for j in range(k + 1)) / (2**k * k) for k in entries.tolist()]
    return _mean(np.array(chance), votes[1:].sum(axis=1))


class SignAgreement(Analysis):
    """Share of tasks with the majority's sign, after pruning in the original space, in the joint one, and back.

    Args:
        layers: A parameter's name, or a shell pattern for several; all matrices if left out.
    """

    name = "sign_agreement"

    def __init__(self, layers: str | None = None) -> None:
        self.layers = layers

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        return Matrices(candidates.vectors, candidates.recipe, self.layers).problems()

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        method = drm_of(candidates.recipe)
        matrices = Matrices(candidates.vectors, candidates.recipe, self.layers)
        total = {form: np.zeros((len(matrices.tasks) + 1,) * 2, dtype=np.int64) for form in FORMS}
        rows: list[dict[str, object]] = []
        for done, (name, deltas) in enumerate(matrices, 1):
            votes = {form: count_votes(tasks) for form, tasks in _forms(method, deltas)}
            for form in FORMS:
                total[form] += votes[form]
            rows += _rows(name, votes)
            on_step(min(done, len(matrices)), len(matrices))
        table = pd.DataFrame([*rows, *_rows(ALL, total)])
        title = f"Sign agreement of {len(matrices.tasks)} tasks ({method_title(method)})"
        return [Finding(self.name, title, _sentence(total), table, _figure(total, title))]


def _forms(method: DRM, deltas: Sequence[Delta]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """The tasks' tensors in one form after another, so that one is in memory at a time."""
    original = [densify(delta) for delta in deltas]
    yield ORIGINAL, original
    yield ORIGINAL_PRUNED, _pruned_each(original, method.density)
    basis = method.prepare(deltas)
    yield JOINT, basis.rows  # of unit length, which changes no sign
    pruned = method.pruned(basis)
    yield JOINT_PRUNED, pruned
    yield PROJECTED, [basis.U @ rows for rows in pruned]


def _pruned_each(tasks: Sequence[Tensor], density: float) -> list[Tensor]:
    return list(prune_each(tasks, thresholds(lambda: [tasks], density, num_tasks=len(tasks))))


def _rows(name: str, votes: Mapping[str, Votes]) -> Iterator[dict[str, object]]:
    for form, counted in votes.items():
        num_entries = counted.sum(axis=1)
        yield {
            "matrix": name,
            "form": form,
            "agreement (fraction)": agreement(counted),
            "by chance (fraction)": agreement_by_chance(counted),
            "agreement of two tasks or more (fraction)": agreement(counted, fewest=2),
            "positions": int(num_entries.sum()),
            "positions without an entry": int(num_entries[0]),
            "positions with one entry": int(num_entries[1]),
            **{f"agreement in {low:.2f} to {high:.2f} (fraction)": share for (low, high), share in _histogram(counted)},
        }


def _histogram(votes: Votes) -> list[tuple[tuple[float, float], float]]:
    """Share of the positions with an entry by agreement; of the ranges, the last one alone includes its upper end."""
    entries, majority = _axes(votes)
    counted = entries >= 1
    values, weights = majority[counted] / entries[counted], votes[counted]
    inside = (values >= EDGES[0]) & (weights > 0)  # no majority is below one half
    counts, _ = np.histogram((values[inside] + 1e-9).clip(max=1), bins=EDGES, weights=weights[inside])
    shares = counts / max(1, weights.sum())
    return list(zip(pairwise(EDGES.tolist()), shares.tolist(), strict=True))


def _axes(votes: Votes) -> tuple[Votes, Votes]:
    """By place in a table of votes, the number of entries and that of the majority."""
    return np.arange(len(votes))[:, None] + np.zeros_like(votes), np.arange(len(votes)) + np.zeros_like(votes)


def _mean(values: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    return float(np.average(values, weights=weights)) if weights.sum() else float("nan")


def _sentence(votes: Mapping[str, Votes]) -> str:
    found = {form: agreement(counted) for form, counted in votes.items()}
    said = {
        form: f"{100 * found[form]:.1f} % (by chance {100 * agreement_by_chance(counted):.1f} %)"
        for form, counted in votes.items()
    }
    verdict = "higher" if found[PROJECTED] > found[ORIGINAL_PRUNED] else "not higher"
    return (
        f"Sign agreement is {said[ORIGINAL]} before pruning, {said[ORIGINAL_PRUNED]} after pruning in the original "
        f"space, {said[JOINT_PRUNED]} after pruning in the joint space, and {said[PROJECTED]} once that is projected "
        f"back, which is {verdict} than after pruning in the original space, and "
        f"{100 * (found[PROJECTED] - found[ORIGINAL]):+.1f} points against no pruning at all."
    )


def _figure(votes: Mapping[str, Votes], title: str) -> Figure:
    figure, (plot,) = new_figure(7.2, 4.2)
    plot.set_title(title, fontsize=9)
    width = 1 / (len(votes) + 1)
    for index, (form, counted) in enumerate(votes.items()):
        shares = [share for _, share in _histogram(counted)]
        places = np.arange(len(shares)) + (index - (len(votes) - 1) / 2) * width
        label = f"{form}: {100 * agreement(counted):.1f} %"
        plot.bar(places, shares, width, color=COLORS[index], label=label)
    ticks = [f"{100 * low:.0f}–{100 * high:.0f}" for low, high in pairwise(EDGES)]
    plot.set_xticks(range(len(ticks)), ticks, fontsize=8)
    plot.set_xlabel("tasks that agree at a position (%)")
    percent(plot, "positions with an entry")
    plot.legend(fontsize=8, frameon=False, title="average agreement", title_fontsize=8)
    return figure
