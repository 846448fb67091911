"""What is known of the tasks' training data: whether that is enough for a method, and what it means for a recipe."""

from collections.abc import Mapping, Sequence

from lightning_drm.deltas import Kind, TaskVector
from lightning_drm.fusion.recipe import Recipe, Treatment
from lightning_drm.merging import Method, Need


def treatments(
    recipe: Recipe, kinds: Mapping[str, Kind], tasks: Sequence[str], vectors: Sequence[TaskVector]
) -> dict[str, Treatment]:
    """By name, what a recipe does to each parameter, given the statistics that its method needs.

    Args:
        recipe: The recipe.
        kinds: By name, what each parameter is to its layer.
        tasks: The tasks, in the order of the coefficients.
        vectors: Their vectors, at least one, in any order.
    """
    need = recipe.method.needs
    known = set() if need is None else set.intersection(*(_names(vector, need) for vector in vectors))
    return {name: recipe.treatment(name, kind, tasks, informed=name in known) for name, kind in kinds.items()}


def problem_of_statistics(method: Method, vectors: Sequence[TaskVector]) -> str | None:
    """Why a method cannot have the statistics that it needs; ``None`` if it can, or needs none.

    Args:
        method: The method.
        vectors: The task vectors that it is to merge.
    """
    need = method.needs
    if need is None:
        return None
    name = type(method).__name__
    collected = [vector.statistics.collected.get(need) if vector.statistics is not None else None for vector in vectors]
    if method.propagate and not all(how is not None and how.propagated for how in collected):
        return (
            f"{name} with propagate takes the inputs of each block from the merge itself, which needs the tasks' data: "
            "MergeTrainer's fit, merge and compare have them (lightning-drm with a data: block)."
        )
    if without := [vector.task for vector, how in zip(vectors, collected, strict=True) if how is None]:
        return (
            f"{name} needs statistics of every task's training data ({need}), and there are none of "
            f"{', '.join(without)}: `lightning-drm collect` takes them from the finished tasks of a run without "
            "training, in Python MergeSession.collect_statistics does; models that others made have none."
        )
    others = {
        vector.task: number
        for vector in vectors
        if vector.statistics is not None
        and (number := vector.statistics.collected[need].num_samples) != (method.num_samples or number)
    }
    if others:
        listed = ", ".join(f"{number} of {task}" for task, number in others.items())
        return (
            f"{name} is to use statistics of {method.num_samples} training samples of each task (num_samples), but "
            f"those that were collected are of {listed}: collect them again, or say the same number."
        )
    return None


def _names(vector: TaskVector, need: Need) -> set[str]:
    return vector.statistics.names(need) if vector.statistics is not None else set()
