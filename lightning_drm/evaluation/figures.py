"""How all figures look: color-blind safe, with units, fractions in percent; and how they are written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_drm.evaluation.score import Interval
from lightning_drm.storage import written_whole

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Eight colors that color-blind people can tell apart (Okabe and Ito, 2008); beyond eight, vary markers too."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Point = tuple[float, Interval | None]
"""A value and its interval, where it is known."""

# The same file each time, in which letters stay letters.
_SVG: dict[Any, str] = {"svg.hashsalt": "lightning_drm", "svg.fonttype": "none"}


def new_figure(width: float = 6.4, height: float = 4.2, *, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure.

    Args:
        width: Its width in inches.
        height: Its height in inches.
        columns: How many plots stand side by side.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for plot in axes:
        plot.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def percent(axes: Axes, label: str) -> None:
    """Shows the fractions on the vertical axis in percent.

    Args:
        axes: The plot.
        label: What they are, without the unit.
    """
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_ylabel(f"{label} (%)")


def style_of(index: int) -> dict[str, Any]:
    """Color and marker of one of several lines; no two of the first 56 are alike."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[(index // len(COLORS) + index) % len(MARKERS)]}


def bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Point]], label: str, *, signed: bool = False
) -> None:
    """Draws fractions as horizontal bars from 0, in percent with one decimal, with their intervals.

    Args:
        axes: The plot.
        groups: The groups' names, from top to bottom.
        series: By name, each group's value and interval; NaN leaves a bar out.
        label: What is shown, without the unit.
        signed: Whether they are changes, which go both ways, in points.
    """
    height = 0.8 / len(series)
    known = [(value, interval or (value, value)) for values in series.values() for value, interval in values]
    ends = [max(value, 0.0, high) for value, (_, high) in known]
    starts = [min(value, 0.0, low) for value, (low, _) in known]
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * height for group in range(len(groups))]
        axes.barh(places, [value for value, _ in values], height, label=name, color=COLORS[number % len(COLORS)])
        for place, (value, interval) in zip(places, values, strict=True):
            if np.isnan(value):
                continue
            low, high = interval or (value, value)
            if interval is not None:
                errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(value, place, xerr=errors, color="0.2", linewidth=0.8, capsize=2)
            end = (max(value, high, 0.0), place)
            text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
            axes.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    room = 0.12 * (np.nanmax(ends) - np.nanmin(starts))
    axes.set_xlim(np.nanmin(starts) - (room if signed else 0.0), np.nanmax(ends) + room)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_xlabel(f"{label} ({'points' if signed else '%'})")
    if signed:
        axes.axvline(0, color="0.4", linewidth=0.8)


def line(axes: Axes, index: int, places: Sequence[float], values: Sequence[Point], label: str) -> None:
    """Draws one of several lines, with a band where there are intervals.

    Args:
        axes: The plot.
        index: Which of the lines it is, for its style.
        places: Where its points are, on the horizontal axis.
        values: Each point's value and interval.
        label: Its name.
    """
    style = style_of(index)
    color, marker = style["color"], style["marker"]
    axes.plot(
        places, [value for value, _ in values], color=color, marker=marker, linewidth=1.2, markersize=4, label=label
    )
    edges = [interval or (value, value) for value, interval in values]
    axes.fill_between(places, [low for low, _ in edges], [high for _, high in edges], alpha=0.15, color=color)


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    around_zero: bool = False,
    limits: tuple[float, float] | None = None,
    decimals: int = 1,
) -> None:
    """Draws a table of numbers as colored cells, with the numbers in them.

    Args:
        axes: The plot.
        values: By row, one number for each column; NaN leaves a cell empty.
        rows: The rows' names.
        columns: The columns' names.
        texts: What is written in place of the numbers.
        around_zero: Whether numbers above 0 and below it are to be told apart at a glance.
        limits: The numbers at the ends of the colors, where several maps are to have the same; otherwise, those of the
            table.
        decimals: How many of a number are shown.
    """
    table = np.asarray(values, dtype=float)
    if around_zero:
        limit = max(float(np.nanmax(np.abs(table))), 1e-12)
        image = axes.imshow(table, aspect="auto", cmap=matplotlib.colormaps["PuOr_r"], vmin=-limit, vmax=limit)
        dark = np.abs(table) > 0.5 * limit
    else:
        low, high = limits or (None, None)
        image = axes.imshow(table, aspect="auto", cmap=matplotlib.colormaps["cividis"], vmin=low, vmax=high)
        dark = np.asarray(image.norm(table)) < 0.5
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for row, column in np.argwhere(~np.isnan(table)):
        color = "w" if dark[row, column] else "k"
        text = f"{table[row, column]:.{decimals}f}" if texts is None else texts[row][column]
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def write_png(figure: Figure, path: Path) -> None:
    """Writes a figure as pixels.

    Args:
        figure: The figure.
        path: The file.
    """
    with written_whole(path) as place:
        figure.savefig(place, dpi=150, format="png")


def write_svg(figure: Figure, path: Path) -> None:
    """Writes a figure.

    Args:
        figure: The figure.
        path: The file.
    """
    with written_whole(path) as place, matplotlib.rc_context(_SVG):
        figure.savefig(place, format="svg", metadata={"Date": None})
