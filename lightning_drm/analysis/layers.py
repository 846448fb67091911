r"""Which layers of a merge cost which task most.

For each task t and each block of the model's depth, all of the merged model stays but the block's parameters:

1. The block gets the task's own delta: what the task gains is what the merge costs it there.
2. The block gets the base's weights: what the task loses is what it owes to the merged block.

Both are changes of the task's normalized score, in points of its finetune's:

.. math:: \Delta = 100 \left( \frac{\mathrm{score}_t(\mathrm{changed})}{\mathrm{individual}_t}
    - \frac{\mathrm{score}_t(\mathrm{merged})}{\mathrm{individual}_t} \right)

What is in no block is taken together: embeddings, and all others. Cost: two evaluations of one task for each task and
block.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.summary import comparison
from lightning_drm.deltas import Kind
from lightning_drm.evaluation import Candidates, Deltas, Finding
from lightning_drm.evaluation.figures import heat_map, new_figure
from lightning_drm.evaluation.short_names import short_names
from lightning_drm.fusion import method_title
from lightning_drm.fusion.blocks import OUTSIDE, block_of, in_depth

EMBEDDINGS = "embeddings"

CHANGE = "change of the normalized score (points)"

OWN, BASE = "own delta", "base"
"""What a block gets in place of the merged delta."""


class Layers(Analysis):
    """Each task's score when one block keeps that task's own delta, or the base's weights, in the merged model."""

    name = "layers"
    needs_scores = True

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        merged = candidates.merged(candidates.recipe)
        whole = comparison(candidates, candidates.scores(merged, intervals=False))
        if not whole.compared:
            raise ValueError("No task has a finetune with a score above 0, by which merged ones could be divided.")
        blocks = grouped({n: kind for vector in candidates.vectors.values() for n, kind in vector.kinds.items()})
        jobs = [(task, block, what) for task in whole.compared for block in blocks for what in (OWN, BASE)]
        table = []
        for number, (task, block, what) in enumerate(jobs, 1):
            own = candidates.of_task(task) if what == OWN else {}
            scores = candidates.scores(exchanged(merged, own, blocks[block]), [task], intervals=False)
            before, after = whole.normalized[task], comparison(candidates, scores, [task]).normalized[task]
            assert before is not None
            assert after is not None
            table.append(
                {
                    "task": task,
                    "block": block,
                    "in place of the merged delta": what,
                    "score": scores[task].value,
                    "score of the merge": whole.scores["merged"][task],
                    CHANGE: 100 * (after - before),
                }
            )
            on_step(number, len(jobs))
        found = pd.DataFrame(table)
        title = f"What each layer costs the tasks ({method_title(candidates.recipe.method)})"
        return [Finding(self.name, title, _sentence(found), found, _figure(found, title))]


def grouped(kinds: Mapping[str, Kind]) -> dict[str, list[str]]:
    """Parameters by block, in the order of depth; first what is in no block.

    Args:
        kinds: By name, what each parameter is to its layer.

    Example:
        >>> grouped({"layer.1.weight": "matrix", "words.weight": "embedding", "norm.bias": "other"})
        {'embeddings': ['words.weight'], 'outside blocks': ['norm.bias'], 'layer.1': ['layer.1.weight']}
    """
    found: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        block = block_of(name)
        found.setdefault(EMBEDDINGS if block == OUTSIDE and kind == "embedding" else block, []).append(name)
    outside = [block for block in (EMBEDDINGS, OUTSIDE) if block in found]
    inside = in_depth(block for block in found if block not in outside)
    short = short_names(inside)
    return {block: found[block] for block in outside} | {short[block]: found[block] for block in inside}


def exchanged(merged: Deltas, own: Deltas, names: Sequence[str]) -> dict[str, Tensor]:
    """A merge in which some parameters have other deltas.

    Args:
        merged: The merged deltas.
        own: The other deltas; the base's weights where there are none.
        names: Of which parameters.

    Example:
        >>> import torch
        >>> sorted(exchanged({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.zeros(1)}, ["a", "b"]))
        ['a']
    """
    kept: Mapping[str, Tensor] = {name: merged[name] for name in merged if name not in set(names)}
    return {**kept, **{name: own[name] for name in names if name in own}}


def _sentence(found: pd.DataFrame) -> str:
    own, base = (found[found["in place of the merged delta"] == what] for what in (OWN, BASE))
    most, least = own.loc[own[CHANGE].idxmax()], base.loc[base[CHANGE].idxmin()]
    by_block = own.groupby("block", sort=False)[CHANGE].mean()
    costs = "The merge costs no task anything in any single block."
    if most[CHANGE] > 0:
        costs = (
            f"The merge costs {most['task']} most in {most['block']}: with its own delta there, its normalized score "
            f"changes by {most[CHANGE]:+.1f} points. On average over tasks, {by_block.idxmax()} costs most, "
            f"{by_block.max():+.1f} points."
        )
    worse = "No task owes anything to the merged delta of any single block."
    if least[CHANGE] < 0:
        worse = (
            f"{least['task']} owes most to the merged delta of {least['block']}: with the base's weights there, its "
            f"normalized score changes by {least[CHANGE]:+.1f} points."
        )
    return f"{costs} {worse}"


def _figure(found: pd.DataFrame, title: str) -> Figure:
    tasks, blocks = (list(dict.fromkeys(found[column])) for column in ("task", "block"))
    figure, axes = new_figure(2.5 + 1.1 * len(blocks), 1.6 + 0.4 * len(tasks), columns=2)
    figure.suptitle(title, fontsize=9)
    named = {OWN: "the block keeps the task's own delta", BASE: "the block has the base's weights"}
    for plot, (what, label) in zip(axes, named.items(), strict=True):
        part = found[found["in place of the merged delta"] == what].set_index(["task", "block"])[CHANGE]
        heat_map(plot, [[part[task, block] for block in blocks] for task in tasks], tasks, blocks, around_zero=True)
        plot.tick_params(axis="x", rotation=60)
        plot.set_title(f"{label}:\nchange of the normalized score (points)", fontsize=8)
    return figure
