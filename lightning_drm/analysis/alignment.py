"""How well task vectors, and a merge of them, are aligned, beside what each task keeps of its score.

1. The cosine of each pair of task vectors: over all parameters, and over those of each block of the model.
2. The subspace alignment ratio of each task's delta with the merged one, for every matrix, and its average over
   matrices (see `overlap.py`). arXiv 2502.04959 found that tasks of a high ratio keep more of their score.
3. That average beside the task's normalized score: the merged model's over its own finetune's.

Cost: one SVD of each merged matrix, N projections, one merge, and the scores of the finetunes and of the merged model.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.matrices import Matrices, matrix_of
from lightning_drm.analysis.overlap import ERROR, alignment_ratio, cosines, inner_products, leading_directions
from lightning_drm.evaluation import Candidates, Comparison, Finding
from lightning_drm.evaluation.figures import heat_map, new_figure, percent, style_of
from lightning_drm.evaluation.short_names import short_names
from lightning_drm.fusion import method_title
from lightning_drm.fusion.blocks import block_of, in_depth
from lightning_drm.fusion.task_deltas import TaskDeltas
from lightning_drm.merging import Delta

OVERALL = "all parameters"
RATIO = "alignment ratio"
BY_CHANCE = "by chance"
KEPT = "normalized score of the task (fraction)"


class Alignment(Analysis):
    """Cosines between task vectors, and their overlap with the merge beside the tasks' normalized scores.

    Args:
        error: What the merged delta's leading directions leave out of it, as a fraction of its norm.

    Raises:
        ValueError: If that is out of range.
    """

    name = "alignment"
    needs_scores = True

    def __init__(self, error: float = ERROR) -> None:
        if not 0 <= error < 1:
            raise ValueError(f"alignment: error must be at least 0 and below 1, got {error}.")
        self.error = error

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        return Matrices(candidates.vectors, candidates.recipe).problems()

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        matrices = Matrices(candidates.vectors, candidates.recipe)
        deltas = TaskDeltas(list(candidates.vectors.values()), torch.device("cpu"))
        num_steps = len(deltas.kinds) + len(matrices) + 1

        products: dict[str, Tensor] = {}
        for done, name in enumerate(deltas.kinds, 1):
            product = inner_products(deltas.read(name))
            for part in (OVERALL, block_of(name)):
                products[part] = products[part] + product if part in products else product
            on_step(done, num_steps)

        merged = candidates.merged(candidates.recipe)
        rows: list[dict[str, object]] = []
        for done, (name, of_tasks) in enumerate(matrices, len(deltas.kinds) + 1):
            rows += _ratios(name, matrix_of(merged, name), dict(zip(matrices.tasks, of_tasks, strict=True)), self.error)
            on_step(min(done, num_steps - 1), num_steps)
        if not rows:
            raise ValueError("the merge changes no matrix, so tasks cannot be aligned with it.")
        scores = candidates.scores(merged, intervals=False)
        kept = Comparison(candidates.tasks, {}, candidates.individual, scores, {}).normalized
        on_step(num_steps, num_steps)
        ratios = pd.DataFrame(rows)
        ratios[KEPT] = ratios["task"].map(kept)

        setting = f"{method_title(candidates.recipe.method)}, {candidates.split} sets"
        title = f"Alignment of tasks with their merge ({setting}, error {100 * self.error:g} %)"
        found = [Finding("alignment", title, _told_ratios(ratios), ratios, _figure_of_ratios(ratios, title))]
        return [*found, _of_pairs(products, deltas.tasks)] if len(deltas.tasks) > 1 else found


def _of_pairs(products: Mapping[str, Tensor], tasks: Sequence[str]) -> Finding:
    pairs = pd.DataFrame(_pairs(products, tasks))
    title = f"Cosines between the task vectors of {len(tasks)} tasks"
    return Finding("alignment_cosines", title, _told_cosines(pairs), pairs, _figure_of_cosines(pairs, title))


def _pairs(products: Mapping[str, Tensor], tasks: Sequence[str]) -> Iterator[dict[str, object]]:
    for part in [OVERALL, *in_depth(name for name in products if name != OVERALL)]:
        table = cosines(products[part]).tolist()
        for index, task in enumerate(tasks):
            for other in range(index + 1, len(tasks)):
                yield {"part": part, "task": task, "other task": tasks[other], "cosine": table[index][other]}


def _ratios(name: str, merged: Tensor, deltas: Mapping[str, Delta], error: float) -> Iterator[dict[str, object]]:
    directions = leading_directions(merged, error)
    height, count = directions.shape
    if not count:  # the merge leaves this matrix as it was
        return
    for task, delta in deltas.items():
        yield {
            "matrix": name,
            "task": task,
            "leading directions": count,
            RATIO: alignment_ratio(directions, delta),
            BY_CHANCE: sqrt(count / height),
        }


def _told_ratios(ratios: pd.DataFrame) -> str:
    average = _by_task(ratios)
    said = ", ".join(
        f"{task} {row[RATIO]:.3f} and {100 * row[KEPT]:.1f} %" for task, row in average.sort_values(RATIO).iterrows()
    )
    known = average.dropna()
    both_vary = len(known) > 2 and known[RATIO].nunique() > 1 and known[KEPT].nunique() > 1
    correlation = (
        f"their correlation over {len(known)} tasks is {np.corrcoef(known[RATIO], known[KEPT])[0, 1]:+.2f}"
        if both_vary
        else f"{len(known)} tasks are too few, or too much alike, for a correlation"
    )
    return (
        f"Alignment ratio with the merge and share of the finetune's score kept, by task: {said}; {correlation}. "
        f"Random directions would give a ratio of {average[BY_CHANCE].mean():.3f}."
    )


def _told_cosines(pairs: pd.DataFrame) -> str:
    overall = pairs[pairs["part"] == OVERALL].sort_values("cosine")
    least, most = overall.iloc[0], overall.iloc[-1]
    return (
        f"Over all parameters, {most['task']} and {most['other task']} are most alike (cosine {most['cosine']:.3f}), "
        f"and {least['task']} and {least['other task']} least (cosine {least['cosine']:.3f}); the average of "
        f"{len(overall)} pairs is {overall['cosine'].mean():.3f}."
    )


def _by_task(ratios: pd.DataFrame) -> pd.DataFrame:
    return ratios.groupby("task")[[RATIO, BY_CHANCE, KEPT]].mean()


def _figure_of_ratios(ratios: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = new_figure(9.6, 4.0, columns=2)
    figure.suptitle(title, fontsize=9)
    average = _by_task(ratios)
    by_block = ratios.assign(block=ratios["matrix"].map(block_of)).groupby(["block", "task"])[[RATIO, BY_CHANCE]].mean()
    blocks = in_depth(by_block.index.unique("block"))
    for index, (task, row) in enumerate(average.iterrows()):
        look = style_of(index)
        left.plot(row[RATIO], row[KEPT], linestyle="", markersize=8, label=task, **look)
        of_task = by_block.xs(task, level="task").reindex(blocks)
        right.plot(range(len(blocks)), of_task[RATIO], linewidth=1, markersize=4, label=task, **look)
    chance = by_block[BY_CHANCE].groupby("block").mean().reindex(blocks)
    right.plot(range(len(blocks)), chance, color="0.4", linestyle=":", label="random directions")
    left.set_xlabel("alignment ratio, average over matrices")
    percent(left, "merged over finetuned score")
    left.legend(fontsize=7, frameon=False)
    _name_blocks(right, blocks)
    right.set_ylabel("alignment ratio")
    right.legend(fontsize=7, frameon=False)
    return figure


def _figure_of_cosines(pairs: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = new_figure(9.6, 4.2, columns=2)
    figure.suptitle(title, fontsize=9)
    overall = pairs[pairs["part"] == OVERALL]
    tasks = list(dict.fromkeys([*overall["task"], *overall["other task"]]))
    table = np.full((len(tasks), len(tasks)), np.nan)  # the diagonal's ones would hide all differences
    for row in overall.itertuples(index=False):
        here, there = tasks.index(row[1]), tasks.index(row[2])
        table[here, there] = table[there, here] = row[3]
    heat_map(left, table.tolist(), tasks, tasks, decimals=3)
    left.set_title(OVERALL, fontsize=9)
    parts = [part for part in pairs["part"].unique() if part != OVERALL]
    for index, ((task, other), rows) in enumerate(pairs[pairs["part"] != OVERALL].groupby(["task", "other task"])):
        values = rows.set_index("part")["cosine"].reindex(parts)
        right.plot(range(len(parts)), values, linewidth=1, markersize=4, label=f"{task}, {other}", **style_of(index))
    right.axhline(0, color="0.6", linewidth=0.8)
    _name_blocks(right, parts)
    right.set_ylabel("cosine")
    if len(overall) <= 10:
        right.legend(fontsize=7, frameon=False)
    return figure


def _name_blocks(plot: Axes, blocks: Sequence[str]) -> None:
    names = [name.replace(" ", "\n") for name in short_names(blocks).values()]
    plot.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 8 else 0)
    plot.set_xlabel("block")
