"""`tune` for a run: a search on the validation sets, one test of the setting that it chose, and what it leaves behind.

In ``<run>/tune/``: ``study.db`` (Optuna's), ``trials.csv``, ``best.yaml``, a figure and a table for each method, and
``tested.json``, the test scores of the chosen setting: as long as nothing changes, the test sets are not touched again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
import yaml
from rich.markup import escape
from rich.table import Table

from lightning_drm.evaluation import Candidates, Comparison, Score, add_section, write_finding
from lightning_drm.evaluation.report import notes
from lightning_drm.evaluation.sections import FOLDERS
from lightning_drm.evaluation.shown import shown
from lightning_drm.fusion import Recipe
from lightning_drm.storage import write_json, write_text
from lightning_drm.storage.json_files import read_object
from lightning_drm.training.run import Run
from lightning_drm.tuning.pictures import family_finding
from lightning_drm.tuning.progress import tuning_bar
from lightning_drm.tuning.settings import SearchSettings
from lightning_drm.tuning.space import Family, setting_title
from lightning_drm.tuning.trial import Trial, table_of
from lightning_drm.tuning.tune import Tuned, tune

_TESTED_FILE = "tested.json"


def tune_and_test(
    run: Run,
    candidates: Candidates,
    space: Callable[[Recipe, Sequence[str]], list[Family]],
    settings: SearchSettings,
    *,
    show_progress: bool,
) -> None:
    """Searches, tests the chosen setting once, and reports.

    Args:
        run: The run.
        candidates: Makes and measures its merges.
        space: What is searched, given the configured recipe and the tasks.
        settings: How it is searched.
        show_progress: Whether a bar is shown.

    Raises:
        ValueError: If something cannot be searched.
    """
    families = space(candidates.recipe, candidates.tasks)
    folder = run.folder.path / FOLDERS["tuned"]
    run.interruptible.unfinished = "the search was"
    measured = {"tasks": {task: run.scoring.stamp(task, "validation") for task in candidates.tasks}}
    with tuning_bar(shown=show_progress) as on_trial:
        found = tune(candidates, families, folder, settings, measured=measured, on_trial=on_trial)
    _write_trials(run, found, folder)
    recipe = found.chosen.recipe
    run.interruptible.unfinished = "the chosen setting was found, but its test was"
    individual = {task: run.scores(task)["individual"] for task in candidates.tasks}
    test = _tested(run, candidates, recipe, individual, folder)
    description = recipe.description(candidates.tasks)
    comparison = Comparison(candidates.tasks, {}, individual, test, description)
    metrics = comparison.metrics
    untuned = _untuned(run)
    add_section("tuned", _section(found, comparison), run.folder.path, metrics=metrics, made_from=run.made_from)
    write_text(folder / "best.yaml", _best(found, description))
    run.console.print(_table(comparison, untuned))
    _say(run, found, folder)


def _tested(
    run: Run, candidates: Candidates, recipe: Recipe, individual: dict[str, Score], folder: Path
) -> dict[str, Score]:
    """The chosen setting's test scores: the stored ones, if they are of this setting, these deltas and samples."""
    stamps = {task: run.scoring.stamp(task) for task in candidates.tasks}
    made = json.dumps([stamps, recipe.description(candidates.tasks)], sort_keys=True)
    digest, file = xxhash.xxh3_128(made.encode()).hexdigest(), folder / _TESTED_FILE
    stored = read_object(file) if file.is_file() else {}
    if stored.get("of") == digest:
        run.say("The chosen setting was tested before; the test sets are not touched again.")
        scores = stored["scores"]
        return {
            task: Score(scores[task]["value"], individual[task].metric, _pair(scores[task]["interval"]))
            for task in candidates.tasks
        }
    on_test = candidates.measured_on("test")
    (merged,) = on_test.merged_side_by_side([recipe])  # λ goes into the merge, as in `merge`: the same to the last bit
    found = on_test.scores(merged, label="tuned · test")
    scores = {task: {"value": score.value, "interval": score.interval} for task, score in found.items()}
    write_json(file, {"of": digest, "scores": scores})
    return found


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _write_trials(run: Run, found: Tuned, folder: Path) -> None:
    """Writes ``trials.csv`` and a finding for each family; those of an earlier search go."""
    tasks = run.session.tasks
    measured = [trial for _, trials in found.trials for trial in trials]
    write_text(folder / "trials.csv", table_of([*measured, *found.finals, found.untuned], tasks).to_csv(index=False))
    findings = [
        family_finding(family, trials, tasks)
        for family, trials in found.trials
        if any(trial.average is not None for trial in trials)
    ]
    kept = {finding.name for finding in findings}
    for old in folder.glob("*.svg"):
        if old.stem not in kept:
            for file in (old.with_suffix(".json"), old.with_suffix(".csv"), old):
                file.unlink(missing_ok=True)
    for finding in findings:
        write_finding(finding, folder, run.made_from)


def _section(found: Tuned, comparison: Comparison) -> dict[str, Any]:
    """What ``report.json`` says under ``tuned``."""
    intervals = comparison.intervals["merged"]
    return {
        **comparison.method,
        "validation": {"tuned": _validation(found.chosen), "untuned": _validation(found.untuned)},
        "scores": comparison.scores["merged"],
        "intervals": {task: list(interval) if interval else None for task, interval in intervals.items()},
        "normalized": comparison.normalized,
        "num_settings": sum(len(trials) for _, trials in found.trials),
    }


def _validation(trial: Trial) -> dict[str, Any]:
    return {"scores": dict(trial.values), "normalized": {**trial.normalized, "average": trial.average}}


def _best(found: Tuned, description: dict[str, object]) -> str:
    settings = {name: description[name] for name in ("class_path", "init_args")}
    content = {"drm": {"method": settings, "coefficients": description["coefficients"]}}
    return (
        f"# The best setting that `tune` found: {_percent(found.chosen)} of the finetunes' own scores on validation.\n"
        "# To merge with it: lightning-drm merge --config <the run's configuration> --config <this file>\n"
        + yaml.safe_dump(content, sort_keys=False)
    )


def _untuned(run: Run) -> dict[str, Any]:
    """The report of the merge that the run has, if it is about these deltas."""
    file = run.folder.path / "report.json"
    report = read_object(file) if file.is_file() else {}
    is_current = report.get("tasks") == run.session.tasks and report.get("deltas", run.made_from) == run.made_from
    return report if is_current and "scores" in report else {}


def _table(comparison: Comparison, untuned: dict[str, Any]) -> Table:
    """Test scores: finetunes, the merge that the report is about, and the tuned one."""
    table = Table(title="Test scores before and after tuning", caption=_caption(comparison, untuned))
    table.caption_justify = "left"
    for column in ("task", "individual", *(["untuned"] if untuned else []), "tuned"):
        table.add_column(column, justify="left" if column == "task" else "right")

    def row(name: str, label: str, is_fraction: bool) -> list[str]:
        before = untuned.get("scores", {}).get("merged", {}).get(name)
        between = untuned.get("intervals", {}).get("merged", {}).get(name)
        cells = [
            shown(comparison.scores["individual"][name], comparison.intervals["individual"][name], is_fraction),
            *([shown(before, between, is_fraction)] if untuned else []),
            shown(comparison.scores["merged"][name], comparison.intervals["merged"][name], is_fraction),
        ]
        return [escape(cell) for cell in (label, *cells)]

    for index, (task, info) in enumerate(comparison.metrics.items()):
        label = task if info.name == "accuracy" else f"{task}\n  {info.name}"
        table.add_row(*row(task, label, info.is_fraction), end_section=index == len(comparison.tasks) - 1)
    table.add_row(*row("average", "average", True), style="bold")
    before = untuned.get("normalized", {}).get("average")
    normalized = [
        *([shown(before, None, True)] if untuned else []),
        shown(comparison.normalized["average"], None, True),
    ]
    table.add_row("normalized average", "", *normalized)
    return table


def _caption(comparison: Comparison, untuned: dict[str, Any]) -> str:
    lines = notes(comparison, "±")
    if untuned:
        method = untuned["method"]
        values = ", ".join(f"{name} {value}" for name, value in method["init_args"].items())
        lines.append(f"untuned: {method['class_path'].rpartition('.')[2]}{f' ({values})' if values else ''}")
    return "\n".join(lines)


def _say(run: Run, found: Tuned, folder: Path) -> None:
    chosen, untuned = found.chosen, found.untuned
    pruned = sum(trial.average is None for _, trials in found.trials for trial in trials)
    total = sum(len(trials) for _, trials in found.trials)
    run.say(
        f"Best of {total} settings{f', {pruned} of which were given up early' if pruned else ''}: "
        f"{setting_title(chosen.recipe)}. On all validation samples it reaches {_percent(chosen)} of the "
        f"finetunes' own scores; as configured ({setting_title(untuned.recipe)}): {_percent(untuned)}."
    )
    run.say(
        f"Every setting: {folder / 'trials.csv'}. The study, which Optuna's dashboard opens: {folder / 'study.db'}."
    )
    run.say(f"To merge with the best setting, add --config {folder / 'best.yaml'} to `merge`.")


def _percent(trial: Trial) -> str:
    return f"{100 * trial.reached:.1f} %"
