"""What a task loses in the merge, and to which other task.

1. Choose the task whose merged score is the lowest share of its own finetune's, unless another one is named.
2. Count its samples by true and predicted class, before the merge (its own finetune) and after it. Only tasks with one
   class per sample have such a table.
3. Merge it with each other task alone, and merge all tasks but one: the other task with which it is worst, and the one
   without which it is best, are those that it conflicts with.

Cost: two merges for each other task, each measured on the one task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.summary import comparison
from lightning_drm.evaluation import Candidates, Finding, Predictions, Score
from lightning_drm.evaluation.figures import Point, bars, heat_map, new_figure
from lightning_drm.fusion import method_title

_FEW = 12
"""Up to how many classes the numbers are written into the cells."""


@dataclass(frozen=True)
class Others:
    """The scores of one task in merges with others.

    Attributes:
        finetuned: Its own finetune's.
        merged: In the merge of all tasks.
        pairs: By other task, in the merge of the two.
        without: By other task, in the merge of all tasks but that one.
    """

    finetuned: Score
    merged: Score
    pairs: Mapping[str, Score]
    without: Mapping[str, Score]

    def ratio(self, score: Score) -> float:
        """A score as a share of the finetune's; the inverse where lower is better, so that higher is."""
        first, second = (score, self.finetuned) if score.metric.higher_is_better else (self.finetuned, score)
        return first.value / second.value if second.value > 0 else float("nan")


class Conflicts(Analysis):
    """For one task that lost: confusion matrices before and after, and which other task it conflicts with most.

    Args:
        task: The task; the one with the lowest normalized score if left out.
    """

    name = "conflicts"
    needs_scores = True

    def __init__(self, task: str | None = None) -> None:
        self.task = task

    @override
    def unavailable(self, candidates: Candidates) -> str | None:
        return None if len(candidates.tasks) > 1 else "a single task has no other to conflict with"

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        if self.task is None or self.task in candidates.tasks:
            return []
        return [f"There is no task {self.task!r}; tasks: {', '.join(candidates.tasks)}."]

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        num_steps = 2 * len(candidates.tasks) + 1
        merged = candidates.merged(candidates.recipe)
        scores = candidates.scores(merged)
        on_step(1, num_steps)
        task = self.task or _lowest(candidates, scores)
        tables = [
            candidates.predictions(candidates.of_task(task), task, own_statistics=True),
            candidates.predictions(merged, task),
        ]
        on_step(2, num_steps)
        pairs: dict[str, Score] = {}
        without: dict[str, Score] = {}
        for number, other in enumerate((other for other in candidates.tasks if other != task), 1):
            pairs[other] = self._score(candidates, task, [t for t in candidates.tasks if t in (task, other)])
            on_step(2 * number + 1, num_steps)
            without[other] = self._score(candidates, task, [t for t in candidates.tasks if t != other])
            on_step(2 * number + 2, num_steps)
        found = Others(candidates.individual[task], scores[task], pairs, without)
        method = method_title(candidates.recipe.method)
        title = f"Conflicts of {task} in the merge of {len(candidates.tasks)} tasks ({method})"
        before, after = tables
        sentence = _sentence(task, found)
        if before is None or after is None:
            sentence += f" {task} has no classes, so there is no confusion matrix."
        findings = [Finding(self.name, title, sentence, _table(found), _figure(task, found, title))]
        if before is not None and after is not None:
            title = f"Confusions of {task} before and after the merge of {len(candidates.tasks)} tasks ({method})"
            findings.append(self._confusion(title, before, after, _names(candidates, task, before.num_classes)))
        return findings

    def _score(self, candidates: Candidates, task: str, tasks: Sequence[str]) -> Score:
        merged = candidates.merged(candidates.recipe, {each: candidates.vectors[each] for each in tasks})
        return candidates.scores(merged, [task])[task]

    def _confusion(self, title: str, before: Predictions, after: Predictions, names: Sequence[str]) -> Finding:
        counts = {"finetuned": confusion_matrix(before), "merged": confusion_matrix(after)}
        table = pd.DataFrame(
            {"model": model, "true class": true, "predicted class": predicted, "samples": int(matrix[row, column])}
            for model, matrix in counts.items()
            for row, true in enumerate(names)
            for column, predicted in enumerate(names)
        )
        sentence = _sentence_on_confusions(counts["finetuned"], counts["merged"], names)
        figure = _figure_of_confusions(counts, names, title)
        return Finding(f"{self.name}_confusion", title, sentence, table, figure)


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Counts of samples by true class (rows) and predicted class (columns).

    Args:
        predictions: Predicted and true classes.

    Example:
        >>> import torch
        >>> confusion_matrix(Predictions(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2))
        tensor([[1, 1],
                [0, 1]])
    """
    counts: Tensor = MulticlassConfusionMatrix(predictions.num_classes)(predictions.predicted, predictions.target)
    return counts


def _lowest(candidates: Candidates, scores: Mapping[str, Score]) -> str:
    compared = comparison(candidates, scores)
    if not compared.compared:
        raise ValueError("No task has a finetune with a score above 0, so none can be said to have lost: name a task.")
    return min(compared.compared, key=lambda task: compared.normalized[task] or 0.0)


def _names(candidates: Candidates, task: str, num_classes: int) -> list[str]:
    """The classes' names, or their numbers where the data have no names."""
    return list(getattr(candidates.data([task]).tasks[task], "class_names", map(str, range(num_classes))))


def _sentence(task: str, found: Others) -> str:
    pair = min(found.pairs, key=lambda other: found.ratio(found.pairs[other]))
    left = max(found.without, key=lambda other: found.ratio(found.without[other]))
    which = f"It conflicts most with {pair}" if pair == left else f"It conflicts most with {pair} and {left}"
    return (
        f"{task} falls from {found.finetuned} to {found.merged} in the merge of all tasks. {which}: merged with {pair} "
        f"alone it has {found.pairs[pair]}, the lowest of all pairs; without {left} it has {found.without[left]}, the "
        f"highest of all merges that leave one task out.{_uncertainty(found.merged)}"
    )


def _uncertainty(score: Score) -> str:
    if score.interval is None or not score.metric.is_fraction:
        return ""
    half = (score.interval[1] - score.interval[0]) / 2
    return f" Each score is known to ±{100 * half:.1f} points."


def _table(found: Others) -> pd.DataFrame:
    models = [
        ("finetuned", "", found.finetuned),
        ("merged", "", found.merged),
        *(("merged with one other", other, score) for other, score in found.pairs.items()),
        *(("merged without one other", other, score) for other, score in found.without.items()),
    ]
    return pd.DataFrame(
        {
            "model": model,
            "other task": other,
            "metric": f"{score.metric.name} ({'fraction' if score.metric.is_fraction else 'own unit'})",
            "score": score.value,
            "score, 95 % from": score.interval[0] if score.interval else None,
            "score, 95 % to": score.interval[1] if score.interval else None,
            "normalized (fraction of the finetune's)": found.ratio(score),
        }
        for model, other, score in models
    )


def _sentence_on_confusions(before: Tensor, after: Tensor, names: Sequence[str]) -> str:
    """How many samples are right before and after, and the confusion that grows most."""
    total, right, still = int(before.sum()), int(before.trace()), int(after.trace())
    grown = (after - before).fill_diagonal_(-1)
    true, predicted = divmod(int(grown.argmax()), len(names))
    more = "No confusion has grown."
    if grown.max() > 0:
        counts = f"{int(before[true, predicted])} times before, {int(after[true, predicted])} times after"
        more = f"What grows most: {names[true]} is taken for {names[predicted]}, {counts}."
    return (
        f"Of {total} samples, {100 * right / total:.1f} % are put into their own class before the merge and "
        f"{100 * still / total:.1f} % after it. {more}"
    )


def _figure(task: str, found: Others, title: str) -> Figure:
    figure, axes = new_figure(10.0, 1.8 + 0.35 * (len(found.pairs) + 2), columns=2)
    figure.suptitle(title, fontsize=9)
    info = found.merged.metric
    what = f"{info.name} of {task}" if info.is_fraction else f"{task}, of its finetune's score"
    ends = {"own finetune": found.finetuned, "all tasks merged": found.merged}
    parts = {
        f"{task} merged with one other task": {f"with {other}": score for other, score in found.pairs.items()},
        f"{task} in the merge without one task": {f"without {other}": score for other, score in found.without.items()},
    }
    for plot, (heading, part) in zip(axes, parts.items(), strict=True):
        shown = {**ends, **part}
        bars(plot, list(shown), {task: [_point(found, score) for score in shown.values()]}, what)
        plot.set_title(heading, fontsize=9)
    right = max(plot.get_xlim()[1] for plot in axes)
    for plot in axes:
        plot.set_xlim(0, right)
    return figure


def _point(found: Others, score: Score) -> Point:
    return (score.value, score.interval) if score.metric.is_fraction else (found.ratio(score), None)


def _figure_of_confusions(counts: Mapping[str, Tensor], names: Sequence[str], title: str) -> Figure:
    size = 1.8 + 0.4 * min(len(names), 2 * _FEW)
    figure, axes = new_figure(2 * size + 1, size + 0.5, columns=2)
    figure.suptitle(title, fontsize=8)
    for plot, (model, matrix) in zip(axes, counts.items(), strict=True):
        shares = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        texts = None if len(names) <= _FEW else [[""] * len(names)] * len(names)
        heat_map(plot, shares.tolist(), names, names, texts=texts, limits=(0, 100))
        plot.tick_params(axis="x", rotation=90)
        plot.set_title(f"{model}: share of each true class (%)", fontsize=8)
        plot.set_xlabel("predicted class")
        plot.set_ylabel("true class")
    return figure
