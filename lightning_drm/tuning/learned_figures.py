"""Learned coefficients as pictures: λ of every task and parameter, and the loss over the steps."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_drm.evaluation import Finding
from lightning_drm.evaluation.figures import new_figure, style_of
from lightning_drm.evaluation.short_names import short_names
from lightning_drm.fusion.blocks import block_of
from lightning_drm.tuning.learning import Check
from lightning_drm.tuning.objective import Objective

_MOST_MARKS = 24  # names of blocks below the map that can still be read


def coefficients_finding(
    coefficients: Mapping[str, Sequence[float]],
    has_part: Mapping[str, Sequence[bool]],
    tasks: Sequence[str],
    title: str,
) -> Finding:
    """λ as a heat map: tasks down, parameters in the model's order across.

    Args:
        coefficients: By parameter's name, λ of each task.
        has_part: By parameter's name, for each task whether it adds anything there; elsewhere cells stay empty.
        tasks: The tasks.
        title: The recipe in words.
    """
    rows = [
        {"parameter": name, "task": task, "coefficient": value if there else None}
        for name, row in coefficients.items()
        for task, value, there in zip(tasks, row, has_part[name], strict=True)
    ]
    table = pd.DataFrame(rows)
    values = table["coefficient"].astype(float)
    if values.isna().all():
        ends = "No task adds anything to any parameter."
    else:
        low, high = table.loc[values.idxmin()], table.loc[values.idxmax()]
        means = table.assign(coefficient=values).groupby("task", sort=False)["coefficient"].mean()
        listed = ", ".join(f"{task} {mean:.3f}" for task, mean in means.items())
        ends = (
            f"λ is {low['coefficient']:.3f} ({low['task']}, {low['parameter']}) to {high['coefficient']:.3f} "
            f"({high['task']}, {high['parameter']}); the mean over parameters is {listed}."
        )
    return Finding(
        "coefficients", f"Learned coefficients ({title})", ends, table, _map(table, list(coefficients), tasks)
    )


def loss_finding(checks: Sequence[Check], best: Check, tasks: Sequence[str], objective: Objective) -> Finding:
    """The loss over the steps: of each task, of all, and on the samples that are learned from.

    Args:
        checks: All checks of the fit.
        best: The one with the lowest loss.
        tasks: The tasks.
        objective: What the loss is.
    """
    table = pd.DataFrame(
        {
            "step": check.step,
            **{f"loss of {task}": check.losses[task] for task in tasks},
            "mean loss": check.loss,
            "mean loss of the steps since the last check": check.learned,
        }
        for check in checks
    )
    what = "loss" if objective == "labels" else "entropy"
    figure, (plot,) = new_figure()
    for index, task in enumerate(tasks, 1):
        plot.plot(table["step"], table[f"loss of {task}"], linewidth=1, markersize=3, label=task, **style_of(index))
    plot.plot(table["step"], table["mean loss"], linewidth=2, markersize=4, label="mean", **style_of(0))
    learned = table.dropna()
    plot.plot(
        learned["step"], learned["mean loss of the steps since the last check"], color="0.5", linestyle="--",
        label="mean, samples learned from",
    )  # fmt: skip
    plot.axvline(best.step, color="0.4", linestyle=":", linewidth=1, label="lowest mean")
    plot.set_xlabel("steps")
    plot.set_ylabel(f"{what} on samples that no step sees")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    sentence = (
        f"The mean {what} over tasks, on samples that no step sees, is {checks[0].loss:.4g} at the start and lowest "
        f"after {best.step} of {checks[-1].step} steps: {best.loss:.4g}."
    )
    return Finding("learning", f"Learning coefficients, by {what}", sentence, table, figure)


def _map(table: pd.DataFrame, names: Sequence[str], tasks: Sequence[str]) -> Figure:
    cells = table["coefficient"].astype(float).to_numpy().reshape(len(names), len(tasks)).T
    figure, (axes,) = new_figure(min(14.0, 4.0 + 0.08 * len(names)), 1.9 + 0.3 * len(tasks))
    # Two equal ends would leave no colors.
    image = axes.imshow(np.ma.masked_invalid(cells), aspect="auto", cmap=matplotlib.colormaps["cividis"])
    blocks = [block_of(name) for name in names]
    starts = [0, *(place for place, (before, own) in enumerate(pairwise(blocks), 1) if before != own)]
    short = short_names(dict.fromkeys(blocks))
    marked = starts[:: -(-len(starts) // _MOST_MARKS)]
    axes.set_xticks(marked, [short[blocks[place]] for place in marked], rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    for place in starts[1:]:
        axes.axvline(place - 0.5, color="w", linewidth=0.8)
    axes.set_xlabel("parameters in the model's order, by block")
    figure.colorbar(image, ax=axes, label="λ")
    return figure
