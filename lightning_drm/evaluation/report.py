"""The report of a run: a table for the terminal, and ``report.json``, ``report.md`` and ``report.png``."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from lightning_drm.evaluation.comparison import ROWS, Comparison
from lightning_drm.storage import write_json, write_text, written_whole

SCHEMA = 1
_COLUMNS = (*ROWS, "normalized")
_NOT_APPLICABLE = "n/a"


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes ``report.json``, ``report.md`` and ``report.png``.

    Args:
        comparison: What was measured.
        folder: The run folder.
    """
    write_json(folder / "report.json", report_content(comparison))
    write_text(folder / "report.md", markdown(comparison))
    write_plot(comparison, folder / "report.png")


def report_content(comparison: Comparison) -> dict[str, Any]:
    """What ``report.json`` holds; accuracies are fractions, ``None`` where one does not apply."""
    return {
        "schema": SCHEMA,
        "method": dict(comparison.method),
        "tasks": list(comparison.tasks),
        "accuracy": comparison.accuracy,
        "normalized": comparison.normalized,
    }


def terminal_table(comparison: Comparison) -> Table:
    """The comparison as a table: tasks down; base, individual, merged and normalized accuracy across."""
    table = Table(title=f"Test accuracy, merged with {_method_name(comparison)}")
    table.add_column("task")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for index, cells in enumerate(_cells(comparison)):
        is_last_task = index == len(comparison.tasks) - 1
        table.add_row(*map(escape, cells), end_section=is_last_task, style="bold" if cells[0] == "average" else None)
    return table


def markdown(comparison: Comparison) -> str:
    """``report.md``: the same table, with the method's parameters."""
    lines = [f"| task | {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * len(_COLUMNS)}"]
    rows = [[cell.replace("|", r"\|") for cell in cells] for cells in _cells(comparison)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    parameters = ", ".join(f"`{name}={value}`" for name, value in _parameters(comparison).items())
    return (
        f"# {len(comparison.tasks)} tasks merged with {_method_name(comparison)}\n\n"
        f"Test accuracy. `{comparison.method['class_path']}`: {parameters or 'no parameters'}\n\n"
        + "\n".join(lines)
        + "\n\n"
        "*base*: the untouched backbone with a linear head trained on it; *individual*: each task's own finetune; "
        "*merged*: one backbone for all tasks; *normalized*: merged / individual.\n\n![Test accuracy](report.png)\n"
    )


def write_plot(comparison: Comparison, path: Path) -> None:
    """Writes ``report.png``: per task, one bar each for base, individual and merged accuracy."""
    groups = [*comparison.tasks, "average"]
    figure = Figure(figsize=(max(6.4, 1.5 * len(groups) + 1.5), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.27
    colors = dict(zip(ROWS, matplotlib.colormaps["viridis"]([0.85, 0.5, 0.15]), strict=True))
    for offset, row in enumerate(ROWS):
        values = comparison.accuracy[row]
        positions = [index + (offset - 1) * width for index, group in enumerate(groups) if values[group] is not None]
        heights = [100 * value for group in groups if (value := values[group]) is not None]
        if not heights:
            continue
        bars = axes.bar(positions, heights, width, label=row, color=colors[row])
        axes.bar_label(bars, fmt="%.0f", padding=1, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{len(comparison.tasks)} tasks merged with {_method_name(comparison)}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)
    figure.legend(loc="outside lower center", ncols=len(ROWS), frameon=False)
    with written_whole(path) as place:
        figure.savefig(place, dpi=150, format="png")


def logged_metrics(comparison: Comparison) -> dict[str, float]:
    """The comparison as flat metrics for a Lightning logger: ``merge/<row>/<task>``."""
    tables = {**comparison.accuracy, "normalized": comparison.normalized}
    return {
        f"merge/{row}/{task}": value
        for row, values in tables.items()
        for task, value in values.items()
        if value is not None
    }


def _cells(comparison: Comparison) -> list[list[str]]:
    columns = [*(comparison.accuracy[row] for row in ROWS), comparison.normalized]
    return [[task, *(_percent(column[task]) for column in columns)] for task in [*comparison.tasks, "average"]]


def _percent(value: float | None) -> str:
    return _NOT_APPLICABLE if value is None else f"{100 * value:.1f}"


def _method_name(comparison: Comparison) -> str:
    return str(comparison.method["class_path"]).rpartition(".")[2]


def _parameters(comparison: Comparison) -> dict[str, object]:
    parameters = comparison.method["init_args"]
    assert isinstance(parameters, dict)
    return parameters
