"""The tables of ``report.html``: what stands in a cell, and by what its column is sorted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_drm.evaluation.comparison import ROWS
from lightning_drm.evaluation.published import SOURCE
from lightning_drm.evaluation.shown import shown


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands there.
        value: The number that its column is sorted by; ``None`` for words.
        is_best: Whether no other number of its column is better.
    """

    text: str
    value: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        header: The columns' names.
        rows: The rows, each of as many cells.
        last: A row that stays at the end.
        notes: What a reader must know.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    last: Sequence[Cell] = ()
    notes: Sequence[str] = field(default_factory=list)


def main_table(report: Mapping[str, Any]) -> PageTable:
    """Tasks down; base, individual, merged and normalized scores across.

    Args:
        report: The content of ``report.json``, with scores.
    """
    rows = []
    for task in [*report["tasks"], "average"]:
        cells = [_number(report, task, report["scores"][row][task], _interval(report, row, task)) for row in ROWS]
        rows.append([Cell(named(report, task)), *cells, _ratio(report["normalized"][task])])
    return PageTable(["task", *ROWS, "normalized"], rows[:-1], rows[-1], _notes(report))


def methods_table(report: Mapping[str, Any]) -> PageTable:
    """Methods down; tasks, average and normalized average across, the best of each column marked.

    Args:
        report: The content of ``report.json``, with methods.
    """
    columns = [*report["tasks"], "average"]
    published = {title: entry.get("published", {}).get("average") for title, entry in report["methods"].items()}
    has_published = any(average is not None for average in published.values())
    rows = []
    for title, entry in report["methods"].items():
        cells = [_number(report, column, entry["scores"][column], entry["intervals"][column]) for column in columns]
        beside = [Cell("") if published[title] is None else _ratio(published[title])] if has_published else []
        rows.append([Cell(title), *cells, _ratio(entry["normalized"]["average"]), *beside])
    higher = [True, *(_higher_is_better(report, column) for column in columns), *[True] * (1 + has_published)]
    marked = [_mark_best(cells, is_higher) for cells, is_higher in zip(zip(*rows, strict=True), higher, strict=True)]
    split = next(iter(report["methods"].values()))["split"]
    notes = [f"Measured on the {split} sets; the first method is the configured one. Best numbers are bold."]
    header = ["method", *(named(report, column) for column in columns), "normalized"]
    if has_published:
        header.append("average, published")
        notes.append(f"Published averages are those of {SOURCE}, on the test sets.")
    return PageTable(header, list(zip(*marked, strict=True)), notes=[*notes, *_notes(report)])


def tuned_table(report: Mapping[str, Any]) -> PageTable:
    """Tasks down; individual, untuned and tuned test scores across.

    Args:
        report: The content of ``report.json``, with scores and what was tuned.
    """
    rows, tuned = [], report["tuned"]
    for task in [*report["tasks"], "average"]:
        before = [
            _number(report, task, report["scores"][row][task], _interval(report, row, task))
            for row in ("individual", "merged")
        ]
        after = _number(report, task, tuned["scores"][task], tuned["intervals"][task])
        rows.append([Cell(named(report, task)), *before, after, _ratio(tuned["normalized"][task])])
    notes = [f"Measured on the test sets. Tuned: {tuned['title']}; untuned: the merge of the first table."]
    header = ["task", "individual", "untuned", "tuned", "tuned, normalized"]
    return PageTable(header, rows[:-1], rows[-1], [*notes, *_notes(report)])


def finding_table(file: Path) -> PageTable:
    """A finding's table: percentages with one decimal, other fractions with four digits.

    Args:
        file: The csv file.
    """
    table = pd.read_csv(file, keep_default_na=False, na_values=[""])
    columns = [[_plain(value, "%" in name) for value in table[name].tolist()] for name in table.columns]
    return PageTable(list(table.columns), list(zip(*columns, strict=True)))


def named(report: Mapping[str, Any], task: str) -> str:
    """A task's name, with its metric where that is not accuracy.

    Args:
        report: The content of ``report.json``.
        task: The task, or "average".
    """
    metric = report["metrics"].get(task, {}).get("name", "accuracy")
    return task if metric == "accuracy" else f"{task} ({metric})"


def _number(report: Mapping[str, Any], task: str, value: float | None, interval: Sequence[float] | None) -> Cell:
    fractions = report.get("fractions", report.get("averaged", ()))  # older reports say of fewer metrics what they are
    return Cell(shown(value, interval, task == "average" or task in fractions), value)


def _ratio(value: float | None) -> Cell:
    return Cell(shown(value, None, True), value)


def _interval(report: Mapping[str, Any], row: str, task: str) -> Sequence[float] | None:
    found: Sequence[float] | None = report.get("intervals", {}).get(row, {}).get(task)
    return found


def _higher_is_better(report: Mapping[str, Any], task: str) -> bool:
    return bool(report["metrics"].get(task, {"higher_is_better": True})["higher_is_better"])


def _mark_best(cells: Sequence[Cell], higher_is_better: bool) -> list[Cell]:
    values = [cell.value for cell in cells if cell.value is not None]
    best = (max if higher_is_better else min)(values, default=None)
    return [Cell(cell.text, cell.value, cell.value is not None and cell.value == best) for cell in cells]


def _notes(report: Mapping[str, Any]) -> list[str]:
    found = ["Scores that are fractions are in percent; ± is half of the 95 % interval over the samples."]
    averaged = report.get("averaged", report["tasks"])
    if averaged and averaged != report["tasks"]:
        found.append(f"The average is over {', '.join(averaged)}.")
    if lower := [task for task in report["tasks"] if not _higher_is_better(report, task)]:
        found.append(f"Lower is better for {', '.join(lower)}.")
    return found


def _plain(value: Any, is_percentage: bool) -> Cell:
    if isinstance(value, float):
        if pd.isna(value):
            return Cell("")
        return Cell(f"{value:.1f}" if is_percentage else f"{value:.4g}", value)
    return Cell(str(value), value if isinstance(value, int) and not isinstance(value, bool) else None)
