"""`tune` for a run: a search on the validation sets, one test of the setting that it chose, and what it leaves behind.

In ``<run>/tune/``: ``trials.csv``, ``best.yaml``, figures with their tables, and ``tested.json``, the test scores of
the chosen setting: as long as nothing changes, the test sets are not touched again. A search over settings has its
``study.db`` (Optuna's) there, and learned coefficients are in ``learned.json``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import xxhash
import yaml
from lightning import Callback

from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation import Candidates, Comparison, Score
from lightning_drm.fusion import Recipe
from lightning_drm.storage import write_json, write_text
from lightning_drm.storage.json_files import read_object
from lightning_drm.training.learned import learn_coefficients
from lightning_drm.training.run import Run
from lightning_drm.tuning import (
    Family,
    Outcome,
    SearchOptions,
    SearchSettings,
    search_space,
    searched,
    setting_title,
    table_of,
    tune,
    tuned_section,
    tuned_table,
    tuning_bar,
)

Search: TypeAlias = Callable[[Run, Candidates, Path], Outcome]
"""A run, what makes and measures its merges, and where to keep the search in; what was found out."""


def search_of(
    asked: SearchOptions, *, arguments: Mapping[str, Any], progress_bar: Callable[[str], list[Callback]]
) -> Search:
    """The search that was asked for.

    Args:
        asked: Which, with its options.
        arguments: Arguments of the Trainer, of which a fit of coefficients takes those about hardware.
        progress_bar: Makes the callbacks that show progress under a label, none where it is not shown.

    Raises:
        ValueError: If a number is out of range.
    """
    methods = asked.given.get("methods")
    if asked.search == "gradient":
        settings = asked.learned()
        return partial(
            learn_coefficients, methods=methods, settings=settings, arguments=arguments, progress_bar=progress_bar
        )
    space = partial(search_space, methods=methods, grid=asked.given.get("grid"), coefficients=asked.coefficients)
    return partial(search_settings, space=space, settings=asked.searched(), show_progress=bool(progress_bar("tuning")))


def search_settings(
    run: Run,
    candidates: Candidates,
    folder: Path,
    *,
    space: Callable[[Recipe, Sequence[str], Sequence[TaskVector]], list[Family]],
    settings: SearchSettings,
    show_progress: bool,
) -> Outcome:
    """Searches a grid, or by TPE.

    Args:
        run: The run.
        candidates: Makes and measures its merges.
        folder: Where the study is kept.
        space: What is searched, given the configured recipe, the tasks and their vectors.
        settings: How it is searched.
        show_progress: Whether a bar is shown.

    Raises:
        ValueError: If something cannot be searched.
    """
    tasks = candidates.tasks
    families = space(candidates.recipe, tasks, list(candidates.vectors.values()))
    run.interruptible.unfinished = "the search was"
    measured = {"tasks": run.stamps(tasks, "validation")}
    with tuning_bar(shown=show_progress) as on_trial:
        found = tune(candidates, families, folder, settings, measured=measured, on_trial=on_trial)
    return searched(found, tasks, folder)


def tune_and_test(run: Run, candidates: Candidates, search: Search) -> None:
    """Searches, tests the chosen setting once, and reports.

    Args:
        run: The run.
        candidates: Makes and measures its merges.
        search: The search.

    Raises:
        ValueError: If something cannot be searched.
    """
    folder, tasks = run.folder.path / "tune", candidates.tasks
    found = search(run, candidates, folder)
    run.say(found.sentence)
    _write_trials(found, tasks, folder)
    run.interruptible.unfinished = "a setting was chosen, but its test was"
    individual = {task: run.scores(task)["individual"] for task in tasks}
    test = _tested(run, candidates, found.chosen.recipe, individual, folder)
    description, title = found.chosen.recipe.description(tasks), setting_title(found.chosen.recipe)
    comparison = Comparison(tasks, {}, individual, test, description, title)
    write_text(folder / "best.yaml", _best(found, description))
    run.console.print(tuned_table(comparison, _untuned(run)))
    run.say(" ".join([f"Every setting: {folder}/trials.csv.", *found.hints]))
    run.say(f"To merge with the best setting, give `merge` --config {folder}/best.yaml after the run's configuration.")
    run.keep("tune", found.findings, tuned_section(found, comparison))
    run.say_where("tune")


def _tested(
    run: Run, candidates: Candidates, recipe: Recipe, individual: dict[str, Score], folder: Path
) -> dict[str, Score]:
    """The chosen setting's test scores: the stored ones, if they are of this setting, these deltas and samples."""
    stamps = run.stamps(candidates.tasks, "test")
    made = json.dumps([stamps, recipe.description(candidates.tasks)], sort_keys=True)
    digest, file = xxhash.xxh3_128(made.encode()).hexdigest(), folder / "tested.json"
    stored = read_object(file) if file.is_file() else {}
    if stored.get("of") == digest:
        run.say("The chosen setting was tested before; the test sets are not touched again.")
        return {
            task: Score(
                score["value"], individual[task].metric, tuple(score["interval"]) if score["interval"] else None
            )
            for task, score in stored["scores"].items()
        }
    on_test = candidates.measured_on("test")
    (merged,) = on_test.merged_side_by_side([recipe])  # λ goes into the merge, as in `merge`: the same to the last bit
    found = on_test.scores(merged, label="tuned · test")
    scores = {task: {"value": score.value, "interval": score.interval} for task, score in found.items()}
    write_json(file, {"of": digest, "scores": scores})
    return found


def _write_trials(found: Outcome, tasks: Sequence[str], folder: Path) -> None:
    """Writes ``trials.csv``, and removes the pictures of an earlier search."""
    write_text(folder / "trials.csv", table_of(found.trials, tasks).to_csv(index=False))
    for figure in folder.glob("*.svg"):
        for file in (figure.with_suffix(".json"), figure.with_suffix(".csv"), figure):
            file.unlink(missing_ok=True)


def _untuned(run: Run) -> dict[str, Any]:
    """The report of the merge that the run has, if it is about these deltas, and measured as the tuned one was."""
    file = run.folder.path / "report.json"
    report = read_object(file) if file.is_file() else {}
    made_from = run.made_from
    is_current = report.get("tasks") == run.session.tasks and made_from.holds_for({**made_from.note(), **report})
    return report if is_current and "scores" in report else {}


def _best(found: Outcome, description: Mapping[str, Any]) -> str:
    settings = {name: description[name] for name in ("class_path", "init_args")}
    overrides = [
        {name: value for name, value in one.items() if value not in (None, {})} for one in description["overrides"]
    ]
    content = {"drm": {"method": settings, "coefficients": description["coefficients"], "overrides": overrides}}
    return (
        f"# The best setting that `tune` found: {100 * found.chosen.reached:.1f} % of the finetunes' own scores on\n"
        "# validation. To merge with it, give this file after the run's configuration:\n"
        "#   lightning-drm merge --config CONFIG --config <run folder>/tune/best.yaml\n"
        + yaml.safe_dump(content, sort_keys=False)
    )
