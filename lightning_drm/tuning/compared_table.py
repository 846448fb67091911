"""How a comparison of methods is printed: a line for each method as it comes, and a table at the end."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lightning_drm.evaluation import Comparison, notes, shown
from lightning_drm.tuning.compared import ComparedMethods

_NUM_SIDE_BY_SIDE = 3  # tasks of which numbers and intervals stand on one line; of more, intervals are below
_NUM_COLUMNS = 4  # tasks that have a column; those of more would not fit into 80 characters


def result_line(name: str, comparison: Comparison) -> str:
    """A method's outcome, as it is said while others are still to come.

    Args:
        name: The method's title.
        comparison: Its scores.
    """
    average, interval = comparison.scores["merged"]["average"], comparison.intervals["merged"]["average"]
    if average is None:
        return f"{name}: {', '.join(f'{task} {score}' for task, score in comparison.merged.items())}"
    return (
        f"{name}: average {shown(average, interval, True)}, "
        f"normalized {shown(comparison.normalized['average'], None, True)}"
    )


def compared_table(compared: ComparedMethods) -> Table:
    """Methods down; tasks, average and normalized average across, the best number of each column in bold.

    Where there are many tasks, they have no columns.

    Args:
        compared: The methods' scores.
    """
    first = compared.first
    tasks = first.tasks if len(first.tasks) <= _NUM_COLUMNS else []
    sources = [compared.source] if compared.source else []
    elsewhere = [] if tasks else [f"The scores of each of the {len(first.tasks)} tasks are in the report."]
    table = Table(
        title=f"{first.measured(compared.split)}, {len(compared.by_title)} methods",
        caption="\n".join([compared.sentence, *notes(first, compared.split), *sources, *elsewhere]),
        caption_justify="left",
        box=SIMPLE_HEAD,  # without lines between columns, four tasks fit into 80 characters
    )
    table.add_column("method", min_width=max(len(word) for name in compared.by_title for word in name.split()))
    for task in tasks:
        metric = first.metrics[task].name
        name = task if metric == "accuracy" else f"{task}\n{metric}"
        table.add_column(escape(name.replace("_", "_\n")), justify="right")  # or long names would cut the numbers
    has_published = any("average" in scores for scores in compared.published.values())
    for column in ("average", "normalized", *(["published"] if has_published else [])):
        table.add_column(column, justify="right", min_width=len(column))

    def published(row: str) -> list[str]:
        average = compared.published.get(row, {}).get("average")
        return [shown(average, None, True) if average is not None else ""] if has_published else []

    for row in ("base", "individual"):
        table.add_row(row, *_cells(first, row, tasks), "", *published(row), end_section=row == "individual")
    best = _best(compared.by_title)
    for name, comparison in compared.by_title.items():
        cells = [*_cells(comparison, "merged", tasks), shown(comparison.normalized["average"], None, True)]
        known = _values(comparison)
        values = [(column, known[column]) for column in (*tasks, "average", "normalized")]
        marked = [
            f"[bold]{cell}[/bold]" if value == best[column] else cell
            for cell, (column, value) in zip(cells, values, strict=True)
        ]
        table.add_row(escape(name), *marked, *published(name))
    return table


def _cells(comparison: Comparison, row: str, tasks: Sequence[str]) -> list[str]:
    scores, intervals = comparison.scores[row], comparison.intervals[row]
    fractions = {task: comparison.metrics[task].is_fraction for task in tasks} | {"average": True}
    cells = [shown(scores[task], intervals[task], is_fraction) for task, is_fraction in fractions.items()]
    return cells if len(tasks) <= _NUM_SIDE_BY_SIDE else [cell.replace(" ±", "\n±") for cell in cells]


def _values(comparison: Comparison) -> dict[str, float | None]:
    return {**comparison.scores["merged"], "normalized": comparison.normalized["average"]}


def _best(by_title: Mapping[str, Comparison]) -> dict[str, float | None]:
    """By column, its best number."""
    rows = [_values(comparison) for comparison in by_title.values()]
    lower = {task for item in by_title.values() for task, info in item.metrics.items() if not info.higher_is_better}
    found: dict[str, float | None] = {}
    for column in rows[0]:
        known = [value for row in rows if (value := row[column]) is not None]
        found[column] = (min if column in lower else max)(known, default=None)
    return found
