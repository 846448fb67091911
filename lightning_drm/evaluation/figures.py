"""How all figures look: color-blind safe, with units, fractions in percent; and how they are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_drm.storage import written_whole

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Eight colors that color-blind people can tell apart (Okabe and Ito, 2008); beyond eight, vary markers too."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_SVG: dict[Any, str] = {
    "svg.hashsalt": "lightning_drm",
    "svg.fonttype": "none",
}  # the same file each time; letters stay letters


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


def style_of(index: int) -> dict[str, str]:
    """Color and marker of one of several lines; no two of the first 56 are alike."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[(index // len(COLORS) + index) % len(MARKERS)]}


def heat_map(axes: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draws a table of numbers as colored cells, with the numbers in them.

    Args:
        axes: The plot.
        values: By row, one number for each column; NaN leaves a cell empty.
        rows: The rows' names.
        columns: The columns' names.
    """
    table = np.asarray(values, dtype=float)
    image = axes.imshow(table, aspect="auto", cmap=matplotlib.colormaps["cividis"])
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    dark = np.asarray(image.norm(table)) < 0.5
    for row, column in np.argwhere(~np.isnan(table)):
        color = "w" if dark[row, column] else "k"
        axes.text(column, row, f"{table[row, column]:.1f}", ha="center", va="center", fontsize=7, color=color)


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
