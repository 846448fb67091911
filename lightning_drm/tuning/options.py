"""What `tune` is asked: every option is obeyed by the search that was chosen, or refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_drm.tuning.settings import GradientSettings, Sampler, SearchSettings
from lightning_drm.tuning.space import Coefficients

Search: TypeAlias = Literal[Sampler, "gradient"]

SEARCHED_SAMPLES = 100
"""Of each task, how many validation samples measure a setting unless it is said."""

_TAKES: Mapping[str, tuple[Search, ...]] = {
    "grid": ("grid", "tpe"),
    "num_finalists": ("grid", "tpe"),
    "prune": ("grid", "tpe"),
    "num_trials": ("tpe",),
    "seed": ("tpe", "gradient"),
    "objective": ("gradient",),
    "initial_coefficient": ("gradient",),
    "learning_rate": ("gradient",),
    "max_steps": ("gradient",),
    "patience": ("gradient",),
}
_TAKES_COEFFICIENTS: Mapping[str, tuple[Search, ...]] = {
    "one": ("grid", "tpe"),
    "each": ("tpe", "gradient"),
    "layers": ("gradient",),
}
_OF_GRADIENT = ("objective", "initial_coefficient", "learning_rate", "max_steps", "patience", "seed")
_OF_SEARCH = ("num_trials", "seed", "num_finalists", "prune")


@dataclass(frozen=True)
class SearchOptions:
    """The options of one search.

    Attributes:
        search: Which search.
        num_samples: How many validation samples of each task take part; ``None`` for all, ``"auto"`` for what the
            search usually takes.
        given: By name, all other options that were given.

    Raises:
        ValueError: If there are options that the search does not take; lists all of them.

    Example:
        >>> SearchOptions("gradient", "auto", {"patience": 3}).learned().patience
        3
        >>> SearchOptions("grid", "auto", {"patience": 3, "num_trials": 9})
        Traceback (most recent call last):
            ...
        ValueError: The search 'grid' does not take num_trials (give --search tpe with it), patience (give --search \
gradient with it).
    """

    search: Search
    num_samples: int | Literal["auto"] | None
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        problems = [
            f"{name} ({_advice(searches)})"
            for name, searches in _TAKES.items()
            if name in self.given and self.search not in searches
        ]
        wanted = self.given.get("coefficients")
        if wanted is not None and self.search not in _TAKES_COEFFICIENTS[wanted]:
            problems.append(
                f"coefficients {wanted} ({_advice(_TAKES_COEFFICIENTS[wanted], f'--coefficients {wanted}')})"
            )
        if problems:
            raise ValueError(f"The search {self.search!r} does not take {', '.join(problems)}.")

    @property
    def coefficients(self) -> Coefficients:
        """How many coefficients a search over settings has."""
        found: Coefficients = self.given.get("coefficients", "one")
        return found

    def searched(self) -> SearchSettings:
        """How settings are searched.

        Raises:
            ValueError: If a number is out of range.
        """
        assert self.search != "gradient", "coefficients are learned"
        number = SEARCHED_SAMPLES if self.num_samples == "auto" else self.num_samples
        return SearchSettings(self.search, num_samples=number, **self._own(_OF_SEARCH))

    def learned(self) -> GradientSettings:
        """How coefficients are learned.

        Raises:
            ValueError: If a number is out of range.
        """
        number = None if self.num_samples == "auto" else self.num_samples
        by_parameter = self.given.get("coefficients", "layers") == "layers"
        return GradientSettings(by_parameter=by_parameter, num_samples=number, **self._own(_OF_GRADIENT))

    def _own(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: self.given[name] for name in names if name in self.given}


def _advice(searches: tuple[Search, ...], what: str = "it") -> str:
    return f"give --search {' or '.join(searches)} with {what}"
