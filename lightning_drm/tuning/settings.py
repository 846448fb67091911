"""How settings are searched."""

from dataclasses import dataclass
from typing import Literal

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
        problems = [
            f"{name} must be at least {lowest}, got {value}"
            for name, value, lowest in (
                ("num_trials", self.num_trials, 1),
                ("num_samples", self.num_samples, 1),
                ("num_finalists", self.num_finalists, 1),
                ("seed", self.seed, 0),
            )
            if value is not None and value < lowest
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")
