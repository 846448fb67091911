"""Merged and individual scores over the steps of finetuning.

Task vectors that were taken while the tasks were trained (`DRMMergeCallback(snapshots=…)`), and those of the end, are
merged step by step:

1. Of each step of which all tasks have a snapshot, measure each task's model of that step, with its head of then.
2. Merge the snapshots of the step by the configured recipe, and measure that.
3. Do the same with the finetunes as they are at the end, at the step at which the longest of them ended.

The merged average may peak before the individual ones: tasks that are trained on agree less with each other. Cost: two
evaluations of all tasks a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.summary import Summary, comparison, points, rows, summary
from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation import Candidates, Comparison, Finding, Score
from lightning_drm.evaluation.figures import line, new_figure, percent
from lightning_drm.fusion import method_title
from lightning_drm.merging.low_rank import densify


@dataclass(frozen=True)
class At:
    """What was measured at one step.

    Attributes:
        individual: Each task's own model.
        merged: The merged model.
    """

    individual: Comparison
    merged: Comparison


class Trajectory(Analysis):
    """Merged score, and each task's own, against finetuning steps."""

    name = "trajectory"
    needs_scores = True

    @override
    def unavailable(self, candidates: Candidates) -> str | None:
        found = candidates.snapshots
        if without := [task for task, snapshots in found.items() if not snapshots]:
            only = "" if len(without) == len(found) else f" --only '[{', '.join(without)}]'"
            return (
                f"{', '.join(without)} have no snapshots: finetune them again, with --drm.snapshots '[25, 50]', say, "
                f"and --retrain true{only}"
            )
        if unknown := [task for task, vector in candidates.vectors.items() if vector.num_steps is None]:
            return f"it is not known how many steps {', '.join(unknown)} took"
        if not candidates.snapshots_of_all:
            steps = "; ".join(f"{task} {', '.join(map(str, snapshots))}" for task, snapshots in found.items())
            return (
                f"there is no step of which all tasks have a snapshot ({steps}): finetune them again at the same steps"
            )
        return None

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        steps = {**candidates.snapshots_of_all, _end(candidates): candidates.vectors}
        found: dict[int, At] = {}
        for number, (step, vectors) in enumerate(steps.items(), 1):
            at_end = step == max(steps)
            individual = candidates.individual if at_end else self._individual(candidates, vectors)
            on_step(2 * number - 1, 2 * len(steps))
            heads = {task: vector.head for task, vector in vectors.items()}
            merged = candidates.scores(candidates.merged(candidates.recipe, vectors), heads=heads)
            found[step] = At(comparison(candidates, individual), comparison(candidates, merged))
            on_step(2 * number, 2 * len(steps))
        table = [
            row
            for step, at in found.items()
            for model, compared in (("individual", at.individual), ("merged", at.merged))
            for row in rows(compared, {"steps": step, "model": model})
        ]
        method = method_title(candidates.recipe.method)
        title = f"Merging {len(candidates.tasks)} tasks over their finetuning ({method})"
        return [Finding(self.name, title, _sentence(found), pd.DataFrame(table), _figure(found, title))]

    def _individual(self, candidates: Candidates, vectors: Mapping[str, TaskVector]) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for task, vector in vectors.items():
            dense = {name: densify(delta) for name, delta in vector.deltas.items()}
            found |= candidates.scores(dense, [task], heads={task: vector.head}, own_statistics=True)
        return found


def _end(candidates: Candidates) -> int:
    """After how many steps the longest finetune ended."""
    return max(vector.num_steps or 0 for vector in candidates.vectors.values())


def _sentence(found: Mapping[int, At]) -> str:
    merged = {step: summary(at.merged) for step, at in found.items()}
    individual = {step: summary(at.individual) for step, at in found.items()}
    top, own_top, end = _peak(merged), _peak(individual), max(found)
    later = "" if top == end else f"; from there to the end, at step {end}, it changes by {_change(merged, top, end)}"
    return (
        f"The merged {merged[top].what} is highest at step {top} ({merged[top]}){later}. That of the finetunes is "
        f"highest at step {own_top} ({individual[own_top]})."
    )


def _peak(values: Mapping[int, Summary]) -> int:
    """The step of the highest value; the first one of several."""
    return max(values, key=lambda step: (values[step].value, -step))


def _change(values: Mapping[int, Summary], start: int, end: int) -> str:
    return points(values[end].value - values[start].value)


def _figure(found: Mapping[int, At], title: str) -> Figure:
    steps = sorted(found)
    figure, (left, right) = new_figure(10.0, 4.2, columns=2)
    figure.suptitle(title, fontsize=9)
    for index, name in enumerate(("merged", "individual")):
        averages = [summary(getattr(found[step], name)) for step in steps]
        line(left, index, steps, [value.point for value in averages], name)
    percent(left, summary(found[steps[0]].merged).what)
    left.set_title("average", fontsize=9)
    last = found[steps[-1]].merged
    for index, task in enumerate(last.compared):
        values = [found[step].merged.normalized[task] for step in steps]
        line(right, index, steps, [(value if value is not None else float("nan"), None) for value in values], task)
    percent(right, "merged score, share of the finetune's at the end")
    right.set_title("by task", fontsize=9)
    for plot in (left, right):
        plot.set_xlabel("finetuning steps")
        plot.legend(fontsize=8, frameon=False)
    return figure
