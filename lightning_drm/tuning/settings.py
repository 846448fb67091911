"""How settings are searched, or coefficients learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from lightning_drm.tuning.objective import Objective

Sampler = Literal["grid", "tpe"]


@dataclass(frozen=True)
class SearchSettings:
    """How settings are searched.

    Attributes:
        sampler: ``"grid"`` tries all, ``"tpe"`` proposes some.
        num_trials: How many TPE proposes of each family.
        seed: Decides what TPE proposes.
        num_samples: How many validation samples of each task measure a setting; ``None`` for all.
        num_finalists: How many settings are measured on all of them.
        prune: Whether settings are given up that cannot be among the finalists.

    Raises:
        ValueError: If a number is out of range; lists all that are.
    """

    sampler: Sampler = "grid"
    num_trials: int = 100
    seed: int = 0
    num_samples: int | None = 100
    num_finalists: int = 5
    prune: bool = True

    def __post_init__(self) -> None:
        lowest = {"num_trials": 1, "num_samples": 1, "num_finalists": 1, "seed": 0}
        if problems := _too_low({name: getattr(self, name) for name in lowest}, lowest):
            raise ValueError("; ".join(problems) + ".")


@dataclass(frozen=True)
class GradientSettings:
    """How coefficients are learned.

    Attributes:
        objective: By what: the tasks' own loss on ``"labels"``, or the ``"entropy"`` of their predictions.
        by_parameter: Whether each parameter has coefficients of its own, or one for each task holds for all.
        initial_coefficient: Where each starts; at what is configured, the method's scale included, if left out.
        learning_rate: Adam's.
        max_steps: How many steps are taken at most; each is on one batch of every task.
        patience: How many checks in a row may pass without a lower loss.
        seed: Decides which validation samples are learned from, and their order.
        num_samples: How many validation samples of each task take part; ``None`` for all.

    Raises:
        ValueError: If a number is out of range; lists all that are.
    """

    objective: Objective = "labels"
    by_parameter: bool = True
    initial_coefficient: float | None = None
    learning_rate: float = 1e-3
    max_steps: int = 500
    patience: int = 5
    seed: int = 0
    num_samples: int | None = None

    @property
    def options(self) -> dict[str, object]:
        """The same as options of `tune`."""
        given = {
            "coefficients": "layers" if self.by_parameter else "each",
            "objective": self.objective,
            "initial_coefficient": self.initial_coefficient,
            "learning_rate": self.learning_rate,
            "max_steps": self.max_steps,
            "patience": self.patience,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }
        return {name: value for name, value in given.items() if value is not None}

    def __post_init__(self) -> None:
        lowest = {"num_samples": 2, "max_steps": 1, "patience": 1, "seed": 0}
        problems = _too_low({name: getattr(self, name) for name in lowest}, lowest)
        if not (isfinite(self.learning_rate) and self.learning_rate > 0):
            problems.append(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.initial_coefficient is not None and not isfinite(self.initial_coefficient):
            problems.append(f"initial_coefficient must be finite, got {self.initial_coefficient}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def _too_low(values: Mapping[str, int | None], lowest: Mapping[str, int]) -> list[str]:
    return [
        f"{name} must be at least {lowest[name]}, got {value}"
        for name, value in values.items()
        if value is not None and value < lowest[name]
    ]
