"""Published results, to stand beside those of a run that repeats their experiment.

They are those of Decom-Renorm-Merge (arXiv 2505.23117): accuracies on the test sets, each to one decimal. A number
stands beside a measured one only where both are of the same thing: the same task judged by accuracy, and an untuned
merge with the paper's default setting.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from lightning_drm.fusion import Recipe
from lightning_drm.merging import DARETIES, DRM, TIES, Average, Method, TaskArithmetic

SOURCE = "arXiv 2505.23117"

_UNTUNED: Mapping[str, Method] = {
    "Simple Averaging": Average(),
    "Task Arithmetic": TaskArithmetic(),
    "TIES Merging": TIES(),
    "Dare-TIES": DARETIES(),
    "DRM-H": DRM(),
    "DRM-V": DRM("vertical"),
}


@dataclass(frozen=True)
class Published:
    """What was published about a model.

    Tasks go by their names, whatever the case and punctuation: ``story_cloze`` is StoryCloze.

    Args:
        model: The model's name in the paper's tables.

    Raises:
        ValueError: If nothing was published about it.

    Example:
        >>> Published("ViT-B/32").individual(["cars", "dtd"])
        {'cars': 0.777, 'dtd': 0.796, 'average': 0.7865}
        >>> recipe = Recipe(DRM())
        >>> Published("DeBERTa-v3-Base").merged(recipe, ["story_cloze", "paws", "of my own"])
        {'story_cloze': 0.514, 'paws': 0.84}
    """

    model: str

    def __post_init__(self) -> None:
        if self.model not in (known := list(_results()["model"].unique())):
            raise ValueError(f"Nothing was published about {self.model!r}, but about {', '.join(known)}.")

    @property
    def note(self) -> str:
        """Where the numbers come from."""
        return f"Published: {self.model} in {SOURCE}, on the test sets."

    def individual(self, tasks: Sequence[str]) -> dict[str, float]:
        """Accuracies of the individual finetunes, as fractions, by task; and their average, where all tasks have one.

        Args:
            tasks: The tasks, each judged by accuracy.
        """
        return self._of("Finetuned", tasks)

    def merged(self, recipe: Recipe, tasks: Sequence[str]) -> dict[str, float]:
        """The same of a merge; empty where its method or setting is not in the paper.

        Args:
            recipe: How to merge.
            tasks: The tasks, each judged by accuracy.
        """
        name = _name_of(recipe, tasks)
        return self._of(name, tasks) if name is not None else {}

    def covers(self, tasks: Sequence[str]) -> bool:
        """Whether some tasks are those of the paper, all of them and no other.

        Args:
            tasks: The tasks.
        """
        return {_key(task) for task in tasks} == {_key(task) for task in self._table["task"]} - {"average"}

    def changes(self, recipe: Recipe, tasks: Sequence[str]) -> dict[str, float]:
        """By variation of DRM, how much it changes the average accuracy; empty where that was not studied.

        Args:
            recipe: The merge that is varied.
            tasks: The tasks, each judged by accuracy.
        """
        if not self.covers(tasks) or _name_of(recipe, tasks) != "DRM-H":
            return {}
        table = _ablation()[_ablation()["model"] == self.model].set_index("variation")
        found: dict[str, float] = {}
        for name, row in table.drop(index="all steps", errors="ignore").iterrows():
            change = row["change"] if pd.notna(row["change"]) else row["average"] - table["average"]["all steps"]
            found[str(name)] = _fraction(change)
        return found

    @property
    def _table(self) -> pd.DataFrame:
        table = _results()
        return table[(table["model"] == self.model) & (table["tuned_on_validation"] != "yes")]

    def _of(self, method: str, tasks: Sequence[str]) -> dict[str, float]:
        rows = self._table[self._table["method"] == method]
        known = {_key(task): _fraction(value) for task, value in zip(rows["task"], rows["accuracy"], strict=True)}
        found = {task: known[_key(task)] for task in tasks if _key(task) in known}
        if self.covers(tasks):
            found["average"] = known["average"]
        elif found and len(found) == len(tasks):
            found["average"] = sum(found.values()) / len(found)
        return found


@cache
def _results() -> pd.DataFrame:
    return pd.read_csv(Path(__file__).with_name("published.csv"), comment="#")


@cache
def _ablation() -> pd.DataFrame:
    return pd.read_csv(Path(__file__).with_name("published_ablation.csv"), comment="#")


def _key(task: str) -> str:
    return re.sub(r"[^a-z0-9]", "", task.lower())


def _fraction(percentage: float) -> float:
    return round(float(percentage) / 100, 4)


def _name_of(recipe: Recipe, tasks: Sequence[str]) -> str | None:
    """What the paper calls a recipe, if it is one of its untuned ones."""
    if recipe.overrides or recipe.non_matrix != "average" or any(c != 1 for c in recipe.coefficients_of(tasks)):
        return None
    return next((name for name, method in _UNTUNED.items() if _is_same(method, recipe.method)), None)


def _is_same(one: Method, other: Method) -> bool:
    """Whether two methods are the same but for what they draw at random."""
    settings = [{k: v for k, v in method.hyperparameters().items() if k != "seed"} for method in (one, other)]
    return type(one) is type(other) and settings[0] == settings[1]
