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

from lightning_drm.evaluation import Candidates, Comparison, Score
from lightning_drm.fusion import Recipe
from lightning_drm.storage import write_json, write_text
from lightning_drm.storage.json_files import read_object
from lightning_drm.training.run import Run
from lightning_drm.tuning import (
    Family,
    SearchSettings,
    Tuned,
    family_finding,
    setting_title,
    table_of,
    tune,
    tuned_section,
    tuned_sentence,
    tuned_table,
    tuning_bar,
)


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
    families, tasks = space(candidates.recipe, candidates.tasks), candidates.tasks
    folder = run.folder.path / "tune"
    run.interruptible.unfinished = "the search was"
    measured = {"tasks": {task: run.scoring.stamp(task, "validation") for task in tasks}}
    with tuning_bar(shown=show_progress) as on_trial:
        found = tune(candidates, families, folder, settings, measured=measured, on_trial=on_trial)
    run.say(tuned_sentence(found))
    _write_trials(found, tasks, folder)
    run.interruptible.unfinished = "a setting was chosen, but its test was"
    individual = {task: run.scores(task)["individual"] for task in tasks}
    test = _tested(run, candidates, found.chosen.recipe, individual, folder)
    description, title = found.chosen.recipe.description(tasks), setting_title(found.chosen.recipe)
    comparison = Comparison(tasks, {}, individual, test, description, title)
    write_text(folder / "best.yaml", _best(found, description))
    run.console.print(tuned_table(comparison, _untuned(run)))
    run.say(f"Every setting: {folder}/trials.csv. The study, which Optuna's dashboard opens: {folder}/study.db")
    run.say(f"To merge with the best setting, give `merge` --config {folder}/best.yaml after the run's configuration.")
    finished = [
        (family, trials) for family, trials in found.trials if any(trial.average is not None for trial in trials)
    ]
    run.keep("tune", [family_finding(*pair, tasks) for pair in finished], tuned_section(found, comparison))
    run.say_where("tune")


def _tested(
    run: Run, candidates: Candidates, recipe: Recipe, individual: dict[str, Score], folder: Path
) -> dict[str, Score]:
    """The chosen setting's test scores: the stored ones, if they are of this setting, these deltas and samples."""
    stamps = {task: run.scoring.stamp(task) for task in candidates.tasks}
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


def _write_trials(found: Tuned, tasks: Sequence[str], folder: Path) -> None:
    """Writes ``trials.csv``, and removes what an earlier search found of other families."""
    trials = [trial for _, measured in found.trials for trial in measured]
    write_text(folder / "trials.csv", table_of([*trials, *found.finals, found.untuned], tasks).to_csv(index=False))
    for figure in folder.glob("*.svg"):
        for file in (figure.with_suffix(".json"), figure.with_suffix(".csv"), figure):
            file.unlink(missing_ok=True)


def _untuned(run: Run) -> dict[str, Any]:
    """The report of the merge that the run has, if it is about these deltas."""
    file = run.folder.path / "report.json"
    report = read_object(file) if file.is_file() else {}
    is_current = report.get("tasks") == run.session.tasks and report.get("deltas", run.made_from) == run.made_from
    return report if is_current and "scores" in report else {}


def _best(found: Tuned, description: dict[str, object]) -> str:
    settings = {name: description[name] for name in ("class_path", "init_args")}
    content = {"drm": {"method": settings, "coefficients": description["coefficients"]}}
    return (
        f"# The best setting that `tune` found: {100 * found.chosen.reached:.1f} % of the finetunes' own scores on\n"
        "# validation. To merge with it, give this file after the run's configuration:\n"
        "#   lightning-drm merge --config CONFIG --config <run folder>/tune/best.yaml\n"
        + yaml.safe_dump(content, sort_keys=False)
    )
