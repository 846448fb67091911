"""The picture of a comparison of methods: each one's average with its interval, and its tasks beside it."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from lightning_drm.evaluation import Comparison, Finding
from lightning_drm.evaluation.figures import COLORS, new_figure, style_of
from lightning_drm.evaluation.score import Interval
from lightning_drm.tuning.compared import ComparedMethods


def compared_finding(compared: ComparedMethods) -> Finding:
    """The comparison as a finding: a plot of methods by scores, and the numbers behind it.

    Args:
        compared: The methods' scores.
    """
    first = compared.first
    what = f"{first.measured(compared.split)} of {len(first.tasks)} tasks, {len(compared.by_title)} methods"
    fractions = [task for task in first.tasks if first.metrics[task].is_fraction]
    panels = [fractions, *([task] for task in first.tasks if task not in fractions)]
    panels = [panel for panel in panels if panel]
    figure, axes = new_figure(3.2 + 4.2 * len(panels), 1.7 + 0.36 * len(compared.by_title), columns=len(panels))
    for plot, tasks in zip(axes, panels, strict=True):
        _draw(plot, compared, tasks, in_percent=tasks == fractions)
        plot.set_yticks(range(len(compared.by_title)), list(compared.by_title) if plot is axes[0] else [], fontsize=8)
        plot.invert_yaxis()
    figure.suptitle(what, fontsize=11)
    handles = {label: handle for plot in axes for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return Finding("methods", what, compared.sentence, _numbers(compared), figure)


def _draw(plot: Axes, compared: ComparedMethods, tasks: Sequence[str], *, in_percent: bool) -> None:
    """One panel: the tasks as small points, and where they are fractions, the average as a large one."""
    first, factor = compared.first, 100.0 if in_percent else 1.0
    for index, task in enumerate(tasks):
        values = [comparison.scores["merged"][task] for comparison in compared.by_title.values()]
        heights = [place for place, value in enumerate(values) if value is not None]
        known = [factor * value for value in values if value is not None]
        color, marker = style_of(index + 1).values()
        plot.scatter(known, heights, s=16, alpha=0.8, color=color, marker=marker, label=task, zorder=2)
    if in_percent and first.averaged:
        for height, comparison in enumerate(compared.by_title.values()):
            average, interval = comparison.scores["merged"]["average"], comparison.intervals["merged"]["average"]
            if average is not None:
                label = "average, 95 % interval" if height == 0 else None
                plot.errorbar(
                    factor * average, height, xerr=_errors(average, interval, factor), fmt="o", markersize=7,
                    capsize=3, color=COLORS[0], label=label, zorder=3,
                )  # fmt: skip
                plot.annotate(
                    f"{factor * average:.1f}", (factor * average, height), (0, 7), textcoords="offset points",
                    ha="center", fontsize=7,
                )  # fmt: skip
        for row, style in (("base", ":"), ("individual", "--")):
            value = first.scores[row]["average"]
            if value is not None:
                plot.axvline(factor * value, color="0.4", linestyle=style, linewidth=1, label=f"average, {row}")
    info = first.metrics[tasks[0]]
    direction = "higher" if info.higher_is_better else "lower"
    plot.set_xlabel("score (%)" if in_percent else f"{tasks[0]}: {info.name} ({direction} is better)")
    plot.grid(axis="y", color="0.9", linewidth=0.8)


def _errors(value: float, interval: Interval | None, factor: float) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[factor * max(0.0, value - interval[0])], [factor * max(0.0, interval[1] - value)]]


def _numbers(compared: ComparedMethods) -> pd.DataFrame:
    first = compared.first
    rows = [_row(row, first, row, task) for row in ("base", "individual") for task in (*first.tasks, "average")]
    for name, comparison in compared.by_title.items():
        for task in (*first.tasks, "average"):
            ratio = comparison.normalized[task]
            percentage = None if ratio is None else 100 * ratio
            rows.append({**_row(name, comparison, "merged", task), "normalized (%)": percentage})
    if compared.published:
        for row in rows:
            value = compared.published.get(str(row["method"]), {}).get(str(row["task"]))
            row["published (%)"] = None if value is None else round(100 * value, 2)
    return pd.DataFrame(rows)


def _row(name: str, comparison: Comparison, row: str, task: str) -> dict[str, object]:
    """One observation; fractions have columns of their own, in percent."""
    metrics = {task: (info.name, info.is_fraction) for task, info in comparison.metrics.items()}
    metric, is_fraction = metrics.get(task, ("average", True))
    unit, factor = (" (%)", 100.0) if is_fraction else ("", 1.0)
    numbers = (comparison.scores[row][task], *(comparison.intervals[row][task] or (None, None)))
    known = [None if number is None else factor * number for number in numbers]
    columns = (f"{column}{unit}" for column in ("score", "low", "high"))
    return {"method": name, "task": task, "metric": metric, **dict(zip(columns, known, strict=True))}
