"""What of a run is finished already, and whether it was made as the configuration says now."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_drm.training.run_folder import BATCH_NORM, RunFolder
from lightning_drm.training.session import MergeSession
from lightning_drm.training.settings import changed_settings, flatten


def require_merged_as_configured(folder: RunFolder, session: MergeSession) -> None:
    """Refuses to measure what was merged in another way than the configuration says, as the report would name that.

    Args:
        folder: The run folder.
        session: Knows the recipe that is configured.

    Raises:
        ValueError: If they differ, with all settings that do.
    """
    record = folder.merge_record
    if record is None:
        return
    merged, asked = (dict(flatten(method)) for method in (record["method"], session.recipe.description(session.tasks)))
    for name, parameter in inspect.signature(type(session.recipe.method)).parameters.items():
        if f"init_args.{name}" in asked and merged["class_path"] == asked["class_path"]:
            merged.setdefault(f"init_args.{name}", parameter.default)  # where it was no argument yet
    if BATCH_NORM in record:  # not for models without batch norms, nor in records of older versions
        setting = "batch_norm_batches"
        merged[setting], asked[setting] = record[BATCH_NORM]["batches"], session.batch_norm_batches
    if changes := changed_settings(merged, asked):
        raise ValueError(
            f"{folder.merged} was not merged as the configuration says ({'; '.join(changes)}): run `merge` to merge"
            " with this configuration, or give `test` the one of the merge, such as its --drm.method."
        )


def require_done(folder: RunFolder, tasks: Sequence[str]) -> None:
    """Refuses to go on before some tasks are finetuned.

    Args:
        folder: The run folder.
        tasks: The tasks.

    Raises:
        ValueError: If some are missing, naming them.
    """
    if missing := folder.missing(tasks):
        raise ValueError(f"{folder.path} has no finetune of {', '.join(missing)}: run `fit` first.")


def finished_tasks(
    folder: RunFolder,
    settings: Mapping[str, Mapping[str, object]],
    retrain: bool,
    resume: bool,
    last_checkpoint: Callable[[str, Mapping[str, Any]], Path | None],
) -> tuple[list[str], list[str], dict[str, Path]]:
    """The tasks that are done, those that are only to be measured, and the checkpoints of those that go on.

    Args:
        folder: The run folder.
        settings: By task, the settings of its finetune as they are now.
        retrain: Whether what is done is to be done again.
        resume: Whether interrupted fits go on.
        last_checkpoint: Gives a task's checkpoint from which a fit that began with some settings can go on, if there
            is one.

    Raises:
        ValueError: If some of them were done with other settings, with all of these.
    """
    done: list[str] = []
    collected: list[str] = []
    checkpoints: dict[str, Path] = {}
    problems = []
    for task, current in settings.items():
        started = folder.begun(task)
        continues = started is not None and resume and not (retrain and changed_settings(started, current))
        if retrain and not continues:  # of an interrupted --retrain, the rest is done
            continue
        if folder.is_collected(task) and not (retrain and folder.is_done(task)):
            stored = folder.load_task_vector(task).settings
            (done if folder.is_done(task) else collected).append(task)
        elif started is not None and continues and (checkpoint := last_checkpoint(task, started)):
            stored = started
            checkpoints[task] = checkpoint
        else:
            continue
        if lines := changed_settings(stored, current):
            problems.append(f"  {task}: {'; '.join(lines)}")
    if problems:
        raise ValueError(
            f"{folder.path} has finetunes made with other settings:\n"
            + "\n".join(problems)
            + "\nFinetune them again with --retrain true, or choose another run folder with --drm.dirpath."
        )
    return done, collected, checkpoints
