"""What a search chose, beside what was configured: a table for the terminal, and a section of ``report.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_drm.evaluation import Comparison
from lightning_drm.evaluation.report import notes
from lightning_drm.evaluation.shown import shown
from lightning_drm.tuning.outcome import Outcome
from lightning_drm.tuning.pictures import family_finding
from lightning_drm.tuning.space import setting_title
from lightning_drm.tuning.trial import Trial
from lightning_drm.tuning.tune import STUDY_FILE, Tuned


def searched(found: Tuned, tasks: Sequence[str], folder: Path) -> Outcome:
    """What a search over settings hands on.

    Args:
        found: What it found.
        tasks: The tasks.
        folder: Where its study is.
    """
    trials = [trial for _, measured in found.trials for trial in measured]
    finished = [
        (family, measured) for family, measured in found.trials if any(trial.average is not None for trial in measured)
    ]
    return Outcome(
        found.chosen,
        found.untuned,
        [*trials, *found.finals, found.untuned],
        tuned_sentence(found),
        [family_finding(*pair, tasks) for pair in finished],
        {"num_settings": len(trials)},
        [f"The study, which Optuna's dashboard opens: {folder / STUDY_FILE}"],
    )


def tuned_section(found: Outcome, comparison: Comparison) -> dict[str, Any]:
    """What ``report.json`` says under ``tuned``: the chosen recipe, its scores on both splits, and how it was chosen.

    Args:
        found: What the search found.
        comparison: The chosen setting on the test sets.
    """
    intervals = comparison.intervals["merged"]
    return {
        **comparison.method,
        "title": comparison.method_title,
        "validation": {"tuned": _on_validation(found.chosen), "untuned": _on_validation(found.untuned)},
        "scores": comparison.scores["merged"],
        "intervals": {task: list(interval) if interval else None for task, interval in intervals.items()},
        "normalized": comparison.normalized,
        **found.about,
    }


def tuned_table(comparison: Comparison, untuned: Mapping[str, Any]) -> Table:
    """Test scores of the finetunes, of the merge that the report is about, and of the tuned one.

    Args:
        comparison: The chosen setting on the test sets.
        untuned: ``report.json``; empty where nothing is merged yet, and the column is left out.
    """
    lines = [*notes(comparison), f"tuned: {comparison.method_title}"]
    if untuned:
        name = str(untuned["method"]["class_path"]).rpartition(".")[2]
        lines.append(f"untuned: {untuned.get('title', name)}")  # older reports have no title
    table = Table(title=f"{comparison.measured()}, untuned and tuned", caption="\n".join(lines), caption_justify="left")
    table.add_column("task")
    for column in ("individual", *(["untuned"] if untuned else []), "tuned"):
        table.add_column(column, justify="right")

    def cells(name: str, is_fraction: bool) -> list[str]:
        before = (
            [
                shown(
                    untuned["scores"]["merged"][name],
                    untuned.get("intervals", {}).get("merged", {}).get(name),
                    is_fraction,
                )
            ]
            if untuned
            else []
        )
        own, tuned = (
            shown(comparison.scores[row][name], comparison.intervals[row][name], is_fraction)
            for row in ("individual", "merged")
        )
        return [escape(cell) for cell in (own, *before, tuned)]

    for place, (task, info) in enumerate(comparison.metrics.items(), 1):
        label = task if comparison.is_accuracy else f"{task}\n  {info.name}"
        table.add_row(escape(label), *cells(task, info.is_fraction), end_section=place == len(comparison.tasks))
    table.add_row("average", *cells("average", True), style="bold")
    before = [shown(untuned["normalized"]["average"], None, True)] if untuned else []
    table.add_row("normalized", "", *before, shown(comparison.normalized["average"], None, True))
    return table


def tuned_sentence(found: Tuned) -> str:
    """How many settings were tried, which was chosen, and what that gains on validation.

    Args:
        found: What the search found.
    """
    trials = [trial for _, measured in found.trials for trial in measured]
    pruned = sum(trial.average is None for trial in trials)
    early = f", {pruned} of which were given up early" if pruned else ""
    return (
        f"Best of {len(trials)} settings{early}: {setting_title(found.chosen.recipe)}. On all validation samples it "
        f"reaches {100 * found.chosen.reached:.1f} % of the finetunes' own scores; as configured "
        f"({setting_title(found.untuned.recipe)}) it is {100 * found.untuned.reached:.1f} %.{_edge(found)}"
    )


def _edge(found: Tuned) -> str:
    """What to know of a best setting that has the lowest or the highest value that was tried of some number."""
    chosen = found.chosen
    numbers = next(family.numbers for family, trials in found.trials for t in trials if t.recipe == chosen.recipe)
    ends = [
        f"{name} {chosen.params[name]:g}"
        for name, values in numbers.items()
        if len(values) > 1 and chosen.params[name] in (min(values), max(values))
    ]
    return (
        f" It lies at the edge of what was tried ({', '.join(ends)}): a wider grid may have a better one."
        if ends
        else ""
    )


def _on_validation(trial: Trial) -> dict[str, Any]:
    return {"scores": dict(trial.values), "normalized": {**trial.normalized, "average": trial.average}}
