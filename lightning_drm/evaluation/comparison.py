"""Comparing base, individual and merged models, task by task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROWS = ("base", "individual", "merged")

Accuracies = Mapping[str, float | None]
"""Accuracy by task, as a fraction; ``None`` where it does not apply."""


@dataclass(frozen=True)
class Comparison:
    """Per-task accuracies of the base, the individual finetunes and the merged model.

    Attributes:
        tasks: The tasks in their order.
        base: The untouched backbone with a linear head trained on it, where that is cheap.
        individual: Each task's own finetune.
        merged: The merged model with each task's head.
        method: The merging method: its class path and its parameters.
    """

    tasks: Sequence[str]
    base: Accuracies
    individual: Accuracies
    merged: Accuracies
    method: Mapping[str, object]

    @property
    def accuracy(self) -> dict[str, dict[str, float | None]]:
        """By row (base, individual, merged): accuracy by task, and their ``average``."""
        return {row: self._with_average(getattr(self, row)) for row in ROWS}

    @property
    def normalized(self) -> dict[str, float | None]:
        """Merged over individual accuracy by task, and the ``average`` of these ratios."""
        ratios: dict[str, float | None] = {}
        for task in self.tasks:
            merged, individual = self.merged.get(task), self.individual.get(task)
            ratios[task] = merged / individual if merged is not None and individual else None
        return self._with_average(ratios)

    def _with_average(self, values: Accuracies) -> dict[str, float | None]:
        known = [values.get(task) for task in self.tasks]
        numbers = [value for value in known if value is not None]
        # An average over some of the tasks would not compare with the others.
        average = sum(numbers) / len(numbers) if len(numbers) == len(self.tasks) else None
        return {**dict(zip(self.tasks, known, strict=True)), "average": average}
