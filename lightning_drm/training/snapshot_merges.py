"""Merging the snapshots of all tasks once they are finetuned, so that the loggers show over-training for merging."""

from lightning_drm.data import require_validation_sets
from lightning_drm.evaluation import Comparison
from lightning_drm.training.candidates import RunCandidates
from lightning_drm.training.run import Run


def require_measurable(run: Run) -> None:
    """Refuses to merge snapshots where that could not be measured or logged, before anything is trained.

    Args:
        run: The run.

    Raises:
        ValueError: If several processes work on it, nothing logs, the method needs statistics, or tasks have no
            validation set.
    """
    problems = []
    if run.trainer.world_size > 1:
        problems.append(
            f"it works on one device, got {run.trainer.world_size} (take the snapshots without it, and run `analyze "
            "--only trajectory` on one device)"
        )
    if not run.trainer.loggers:
        problems.append("it needs a logger, got none")
    if run.session.recipe.method.needs is not None:
        problems.append(f"snapshots have no statistics, which {type(run.session.recipe.method).__name__} needs")
    if problems:
        raise ValueError(f"merge_at_snapshots cannot be used here: {'; '.join(problems)}.")
    require_validation_sets(run.data)


def merge_snapshots(run: Run) -> None:
    """Merges the snapshots of each step that all tasks have, by the configured recipe, and logs the scores.

    They are measured on the validation sets, and logged as ``merge/snapshot/<task>`` and ``merge/snapshot/average`` at
    the step. Nothing is stored.

    Args:
        run: The run, with all tasks finetuned.
    """
    with RunCandidates(run, "validation") as candidates:
        steps = candidates.snapshots_of_all
        if not steps:
            run.say("merge_at_snapshots: there is no step of which all tasks have a snapshot, so nothing is merged.")
        for step, vectors in steps.items():
            heads = {task: vector.head for task, vector in vectors.items()}
            merged = candidates.merged(candidates.recipe, vectors)
            scores = candidates.scores(merged, heads=heads, label=f"step {step} · merged", intervals=False)
            row = Comparison(run.session.tasks, {}, {}, scores, {}).scores["merged"]
            measured = {f"merge/snapshot/{name}": value for name, value in row.items() if value is not None}
            for logger in run.trainer.loggers:
                logger.log_metrics(measured, step=step)
                logger.save()
