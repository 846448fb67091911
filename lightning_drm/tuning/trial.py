"""A trial: one setting, and what the validation samples said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import pandas as pd

from lightning_drm.fusion import Recipe
from lightning_drm.tuning.nesting import arguments_of, full_name
from lightning_drm.tuning.space import Params


@dataclass(frozen=True)
class Trial:
    """One setting that was measured.

    Attributes:
        recipe: The setting.
        params: What distinguishes it from the other settings of its family.
        values: By task, its score on the validation samples. A trial that was pruned lacks some tasks.
        normalized: By task, that score over the own finetune's on the same samples; ``None`` where there is no ratio.
        average: The mean of these; ``None`` if the trial was pruned.
        bound: The highest average that was still possible when the trial ended.
        num_samples: How many samples of each task there were at most; ``None`` for all.
    """

    recipe: Recipe
    params: Params
    values: Mapping[str, float]
    normalized: Mapping[str, float | None]
    average: float | None
    bound: float
    num_samples: int | None

    @property
    def reached(self) -> float:
        """The average, to sort by; that of a pruned trial is below all others."""
        return -inf if self.average is None else self.average


def table_of(trials: Sequence[Trial], tasks: Sequence[str]) -> pd.DataFrame:
    """One row a trial: its setting, each task's score and the normalized average.

    Args:
        trials: The trials.
        tasks: The tasks, in their order.
    """
    rows = []
    for trial in trials:
        coefficients = zip(tasks, trial.recipe.coefficients_of(tasks), strict=True)
        row: dict[str, Any] = {"method": full_name(trial.recipe.method), **arguments_of(trial.recipe.method)}
        row |= {f"coefficient of {task}": value for task, value in coefficients}
        row |= {f"score of {task}": trial.values.get(task) for task in tasks}
        row |= {"normalized average": trial.average, "state": "pruned" if trial.average is None else "complete"}
        row["validation samples per task"] = "all" if trial.num_samples is None else trial.num_samples
        rows.append(row)
    table = pd.DataFrame(rows)
    hyperparameters = dict.fromkeys(name for trial in trials for name in arguments_of(trial.recipe.method))
    rest = [name for name in table.columns if name != "method" and name not in hyperparameters]
    return table[["method", *hyperparameters, *rest]]
