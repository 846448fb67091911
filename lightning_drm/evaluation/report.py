"""The report of a run: a table for the terminal, ``report.json``, ``report.md``, a figure, and ``report.html``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_drm.evaluation.comparison import ROWS, Comparison
from lightning_drm.evaluation.figures import write_png, write_svg
from lightning_drm.evaluation.made_from import MadeFrom
from lightning_drm.evaluation.measure import Split
from lightning_drm.evaluation.page import write_page
from lightning_drm.evaluation.picture import report_figure
from lightning_drm.evaluation.sections import SECTIONS, Study, read_sections, write_section
from lightning_drm.evaluation.shown import shown
from lightning_drm.kinds import MetricInfo
from lightning_drm.storage import write_json, write_text
from lightning_drm.storage.json_files import read_object

SCHEMA = 2
_COLUMNS = (*ROWS, "normalized")
_PERCENT = MetricInfo("average", is_fraction=True)


def write_report(comparison: Comparison, folder: Path, made_from: MadeFrom) -> None:
    """Writes ``report.json``, with the sections of studies, ``report.md``, the figure and ``report.html``.

    Args:
        comparison: What was measured.
        folder: The run folder.
        made_from: What it is about.

    Raises:
        ValueError: If a section's file is damaged.
    """
    content = {**report_content(comparison), **made_from.note(), **read_sections(folder, made_from)}
    write_json(folder / "report.json", content)
    write_text(folder / "report.md", markdown(comparison))
    figure = report_figure(comparison)
    write_png(figure, folder / "report.png")
    write_svg(figure, folder / "report.svg")
    write_page(folder, made_from)


def add_section(
    study: Study,
    content: Mapping[str, Any],
    folder: Path,
    *,
    metrics: Mapping[str, MetricInfo],
    made_from: MadeFrom,
) -> None:
    """Keeps a study's section, and puts it into ``report.json`` and the page.

    A report is begun if there is none, or one about something else.

    Args:
        study: The study.
        content: What stands in its section.
        folder: The run folder.
        metrics: By task, how to read its scores.
        made_from: What it is about.

    Raises:
        ValueError: If ``report.json``, or a section's file, is damaged.
    """
    write_section(study, content, folder, made_from)
    file = folder / "report.json"
    report = read_object(file) if file.is_file() else {}
    if report.get("tasks") != list(metrics) or not made_from.holds_for({**made_from.note(), **report}):
        report = _beginning(metrics)  # what older reports do not note is taken to be the same
    earlier = {name: value for name, value in report.items() if name not in SECTIONS.values()}
    write_json(file, {**earlier, **made_from.note(), **read_sections(folder, made_from)})
    write_page(folder, made_from)


def report_content(comparison: Comparison) -> dict[str, Any]:
    """What ``report.json`` holds: scores as their metrics give them, ``None`` where one does not apply."""
    content: dict[str, Any] = {
        **_beginning(comparison.metrics),
        "method": dict(comparison.method),
        "title": comparison.method_title,
        "scores": comparison.scores,
        "intervals": {
            row: {task: list(interval) if interval else None for task, interval in intervals.items()}
            for row, intervals in comparison.intervals.items()
        },
        "normalized": comparison.normalized,
        "averaged": comparison.averaged,
    }
    if comparison.is_accuracy:
        content["accuracy"] = comparison.scores
    return content


def _beginning(metrics: Mapping[str, MetricInfo]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "tasks": list(metrics),
        "metrics": {
            task: {"name": info.name, "higher_is_better": info.higher_is_better} for task, info in metrics.items()
        },
        "fractions": [task for task, info in metrics.items() if info.is_fraction],
    }


def terminal_table(comparison: Comparison) -> Table:
    """The comparison as a table: tasks down with their metrics; base, individual, merged, normalized across."""
    table = Table(
        title=f"{comparison.measured()}, merged with {comparison.method_title}",
        caption="\n".join(notes(comparison)) or None,
        caption_justify="left",
    )
    table.add_column("task")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for index, row in enumerate(_cells(comparison)):
        labels, values = row[: -len(_COLUMNS)], row[-len(_COLUMNS) :]
        cells = ["\n  ".join(filter(None, labels)), *values]  # a column for metrics would not fit into 80 characters
        is_last_task = index == len(comparison.tasks) - 1
        table.add_row(*map(escape, cells), end_section=is_last_task, style="bold" if cells[0] == "average" else None)
    return table


def markdown(comparison: Comparison) -> str:
    """``report.md``: the same table, with the method's parameters."""
    header = _header(comparison)
    labels = len(header) - len(_COLUMNS)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * labels}{'---:|' * len(_COLUMNS)}"]
    rows = [[cell.replace("|", r"\|") for cell in cells] for cells in _cells(comparison)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    parameters = ", ".join(f"`{name}={value}`" for name, value in _parameters(comparison).items())
    explained = [
        "*base*: the untouched backbone, with a linear head trained on it where a task has a head; *individual*: each "
        f"task's own finetune; *merged*: one backbone for all tasks; *normalized*: {_ratio(comparison)}.",
        *notes(comparison),
    ]
    return (
        f"# {len(comparison.tasks)} tasks merged with {comparison.method_title}\n\n"
        f"{comparison.measured()}. `{comparison.method['class_path']}`: {parameters or 'no parameters'}\n\n"
        + "\n".join(lines)
        + "\n\n"
        + " ".join(explained)
        + f"\n\n![{comparison.measured()}](report.png)\n"
    )


def notes(comparison: Comparison, split: Split = "test") -> list[str]:
    """What a reader of a table must know.

    Args:
        comparison: What was measured.
        split: On which samples.
    """
    found = []
    if any(interval for row in comparison.intervals.values() for interval in row.values()):
        found.append(f"±: half of the 95 % interval over {split} samples.")
    tasks = set(comparison.tasks)
    if (averaged := comparison.averaged) and set(averaged) != tasks:
        found.append(f"Scores are averaged over {', '.join(averaged)}, whose scores are percentages.")
    if (compared := comparison.compared) and set(compared) != tasks:
        found.append(f"Normalized scores are averaged over {', '.join(compared)}.")
    if lower := [task for task, info in comparison.metrics.items() if not info.higher_is_better]:
        found.append(f"Lower is better for {', '.join(lower)}.")
    return found


def logged_metrics(comparison: Comparison) -> dict[str, float]:
    """The comparison as flat metrics for a Lightning logger: ``merge/<row>/<task>``."""
    tables = {**comparison.scores, "normalized": comparison.normalized}
    return {
        f"merge/{row}/{task}": value
        for row, values in tables.items()
        for task, value in values.items()
        if value is not None
    }


def _header(comparison: Comparison) -> list[str]:
    return ["task", *([] if comparison.is_accuracy else ["metric"]), *_COLUMNS]


def _cells(comparison: Comparison) -> list[list[str]]:
    rows = []
    metrics = {**comparison.metrics, "average": _PERCENT}
    for task in [*comparison.tasks, "average"]:
        labels = [task] if comparison.is_accuracy else [task, metrics[task].name if task != "average" else ""]
        is_fraction = metrics[task].is_fraction
        values = [shown(comparison.scores[row][task], comparison.intervals[row][task], is_fraction) for row in ROWS]
        rows.append([*labels, *values, shown(comparison.normalized[task], None, True)])
    return rows


def _ratio(comparison: Comparison) -> str:
    higher = any(info.higher_is_better for info in comparison.metrics.values())
    lower = any(not info.higher_is_better for info in comparison.metrics.values())
    if higher and lower:
        return "merged / individual, or individual / merged where lower is better"
    return "merged / individual" if higher else "individual / merged, as lower is better"


def _parameters(comparison: Comparison) -> dict[str, object]:
    parameters = comparison.method["init_args"]
    assert isinstance(parameters, dict)
    return parameters
