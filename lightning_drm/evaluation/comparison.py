"""Comparing base, individual and merged models, task by task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from lightning_drm.evaluation.measure import Split
from lightning_drm.evaluation.score import Interval, Score, interval_of_mean
from lightning_drm.kinds import MetricInfo

ROWS = ("base", "individual", "merged")

Scores = Mapping[str, Score | None]
"""Score by task; ``None`` where there is none."""

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Per-task scores of the base, the individual finetunes and the merged model.

    Attributes:
        tasks: The tasks in their order.
        base: The untouched backbone with a linear head trained on it, where that is cheap.
        individual: Each task's own finetune.
        merged: The merged model with each task's head.
        method: The merging method: its class path and its parameters.
        title: The method with its whole setting, for titles; the class's name if left out.
    """

    tasks: Sequence[str]
    base: Scores
    individual: Scores
    merged: Scores
    method: Mapping[str, object]
    title: str = ""

    @property
    def method_title(self) -> str:
        """What titles call the method."""
        return self.title or str(self.method["class_path"]).rpartition(".")[2]

    @property
    def is_accuracy(self) -> bool:
        """Whether accuracy is every task's metric."""
        return all(info.name == "accuracy" for info in self.metrics.values())

    def measured(self, split: Split = "test") -> str:
        """What was measured, for titles.

        Args:
            split: On which samples.
        """
        return f"{split.capitalize()} {'accuracy' if self.is_accuracy else 'scores'}"

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """By task, how to read its scores."""
        found = {}
        for task in self.tasks:
            scores = (self.merged.get(task), self.individual.get(task), self.base.get(task))
            found[task] = next((score.metric for score in scores if score is not None), MetricInfo("accuracy"))
        return found

    @property
    def averaged(self) -> list[str]:
        """The tasks whose scores can be averaged: those that are fractions, of which higher ones are better."""
        return [task for task, info in self.metrics.items() if info.is_fraction and info.higher_is_better]

    @property
    def compared(self) -> list[str]:
        """The tasks whose merged and individual scores have a ratio."""
        return [task for task in self.tasks if self._ratio(task) is not None]

    @property
    def scores(self) -> dict[str, Numbers]:
        """By row (base, individual, merged): score by task, and the ``average`` of those in `averaged`."""
        return {row: self._row(getattr(self, row)) for row in ROWS}

    @property
    def intervals(self) -> dict[str, dict[str, Interval | None]]:
        """By row: the scores' 95 % intervals; the average's follows from them, as the tasks' test sets are apart."""
        return {row: self._row_of_intervals(getattr(self, row)) for row in ROWS}

    @property
    def normalized(self) -> Numbers:
        """Merged over individual score by task (individual over merged where lower is better), and their ``average``.

        A ratio takes a divisor above 0, but where both make no error at all, it is 1. That of a merged model whose
        score is NaN is NaN, too. The average is that of the tasks in `compared`.
        """
        ratios = {task: self._ratio(task) for task in self.tasks}
        return {**ratios, "average": _mean([ratio for ratio in ratios.values() if ratio is not None])}

    def _ratio(self, task: str) -> float | None:
        merged, individual = self.merged.get(task), self.individual.get(task)
        if merged is None or individual is None:
            return None
        if isnan(merged.value):
            return nan
        if self.metrics[task].higher_is_better:
            return merged.value / individual.value if individual.value > 0 else None
        if merged.value == individual.value == 0:
            return 1.0
        return individual.value / merged.value if merged.value > 0 else None

    def _row(self, scores: Scores) -> Numbers:
        known = {task: score.value if (score := scores.get(task)) is not None else None for task in self.tasks}
        averaged = [known[task] for task in self.averaged]
        # An average over fewer tasks than other rows have would not compare with them.
        return {**known, "average": None if None in averaged else _mean([v for v in averaged if v is not None])}

    def _row_of_intervals(self, scores: Scores) -> dict[str, Interval | None]:
        known = {task: score.interval if (score := scores.get(task)) is not None else None for task in self.tasks}
        average, parts = self._row(scores)["average"], [known[task] for task in self.averaged]
        if average is None or None in parts:
            return {**known, "average": None}
        values = [score.value for task in self.averaged if (score := scores[task]) is not None]
        return {**known, "average": interval_of_mean(values, [part for part in parts if part is not None])}


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
