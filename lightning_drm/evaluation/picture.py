"""The report's figure: per task one bar each for base, individual and merged model, with intervals."""

from collections.abc import Sequence
from math import nan

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_drm.evaluation.comparison import ROWS, Comparison

_WIDTH = 0.27


def report_figure(comparison: Comparison) -> Figure:
    """The report's figure: fractions on one axis in percent, any other metric on an axis of its own.

    Args:
        comparison: What was measured.
    """
    metrics = comparison.metrics
    fractions = [task for task in comparison.tasks if metrics[task].is_fraction]
    others = [task for task in comparison.tasks if task not in fractions]
    averages = ["average"] if comparison.averaged else []
    panels = [[*fractions, *averages], *([task] for task in others)] if fractions else [[task] for task in others]
    sizes = [len(groups) if len(groups) > 1 else 1.3 for groups in panels]
    figure = Figure(figsize=(max(6.4, 1.5 * sum(sizes) + 1.5), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=sizes, squeeze=False)[0]
    for number, groups in enumerate(panels):
        _draw(comparison, axes[number], groups, percent=bool(fractions) and number == 0)
    if fractions:
        _label_percent(axes[0], comparison.measured())
        if averages:
            axes[0].axvline(len(panels[0]) - 1.5, color="0.8", linewidth=1)
    for task, axis in zip(others, axes[len(axes) - len(others) :], strict=True):
        direction = "higher" if metrics[task].higher_is_better else "lower"
        axis.set_ylabel(f"{metrics[task].name} ({direction} is better)")
        axis.set_ylim(top=1.1 * axis.get_ylim()[1])
    figure.suptitle(f"{len(comparison.tasks)} tasks merged with {comparison.method_title}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ROWS), frameon=False)
    return figure


def _draw(comparison: Comparison, axes: Axes, groups: Sequence[str], *, percent: bool) -> None:
    colors = dict(zip(ROWS, matplotlib.colormaps["viridis"]([0.85, 0.5, 0.15]), strict=True))
    factor = 100 if percent else 1
    for offset, row in enumerate(ROWS):
        places, values, errors = [], [], []
        for index, group in enumerate(groups):
            value, interval = comparison.scores[row][group], comparison.intervals[row][group]
            if value is None:
                continue
            low, high = interval or (value, value)
            places.append(index + (offset - 1) * _WIDTH)
            values.append(factor * value)
            errors.append((factor * max(0, value - low), factor * max(0, high - value)) if interval else (nan, nan))
            number = f"{100 * value:.1f}" if percent else f"{value:.3g}"
            top = (places[-1], factor * max(value, high, 0))
            axes.annotate(number, top, (0, 2), textcoords="offset points", ha="center", fontsize=7)
        if values:
            axes.bar(places, values, _WIDTH, label=row, color=colors[row])
            down, up = zip(*errors, strict=True)
            axes.errorbar(places, values, (down, up), fmt="none", ecolor="0.3", elinewidth=0.8, capsize=2)
    axes.set_xticks(range(len(groups)), [_name(comparison, group) for group in groups], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label_percent(axes: Axes, title: str) -> None:
    lowest, _ = axes.get_ylim()
    axes.set_ylim(min(0.0, lowest), 110)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"{title[0].lower()}{title[1:]} (%)")


def _name(comparison: Comparison, group: str) -> str:
    """A group's name, with its metric where that is not accuracy."""
    info = comparison.metrics.get(group)
    return group if info is None or info.name == "accuracy" else f"{group}\n{info.name}"
