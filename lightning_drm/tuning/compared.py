"""What a comparison of methods has found: the best one, and those that the samples do not tell from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_drm.evaluation import Comparison, Published, Score, Split, paired_interval, shown
from lightning_drm.fusion import Recipe


@dataclass(frozen=True)
class ComparedMethods:
    """The scores of several methods on the same samples.

    Attributes:
        by_title: By title of the method, base, individual and merged scores; the configured method comes first.
        split: On which samples.
        published: By title, and for ``individual``, the scores that were published of the same: by task, and their
            ``average``. What has none is left out.
        source: Where they were published.
    """

    by_title: Mapping[str, Comparison]
    split: Split
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""

    def beside(self, published: Published, recipes: Mapping[str, Recipe]) -> "ComparedMethods":
        """The same with what was published of the finetunes and of these methods.

        Args:
            published: What was published.
            recipes: By title, how the methods merge.
        """
        tasks = [task for task, info in self.first.metrics.items() if info.name == "accuracy"]
        found = {"individual": published.individual(tasks)}
        found |= {title: published.merged(recipe, tasks) for title, recipe in recipes.items()}
        if tasks != list(self.first.tasks):  # the measured average is of other tasks
            found = {row: {task: value for task, value in of.items() if task != "average"} for row, of in found.items()}
        found = {row: of for row, of in found.items() if of}
        return replace(self, published=found, source=published.note if found else "")

    @property
    def first(self) -> Comparison:
        """The configured method's scores; tasks, base and individual scores are those of all methods."""
        return next(iter(self.by_title.values()))

    @property
    def best(self) -> str | None:
        """The method with the highest average; ``None`` where no scores can be averaged."""
        averages = {title: scores["average"] for title, scores in self._merged().items()}
        known = {title: average for title, average in averages.items() if average is not None}
        return max(known, key=lambda title: known[title]) if known else None

    @property
    def level_with_best(self) -> list[str]:
        """The methods that the samples do not tell from the best one.

        All methods are measured on the same samples, so what counts is the interval of the difference between two
        averages on these (`paired_interval`): it includes 0.
        """
        if self.best is None:
            return []
        best = self._averaged(self.best)
        found = []
        for title in self.by_title:
            interval = paired_interval(best, self._averaged(title))
            if title != self.best and interval is not None and interval[0] <= 0 <= interval[1]:
                found.append(title)
        return found

    @property
    def sentence(self) -> str:
        """What was found."""
        if self.best is None:
            return f"{len(self.by_title)} methods; their scores cannot be averaged."
        best = self.by_title[self.best]
        found = (
            f"The best average of {len(self.by_title)} methods is that of {self.best}: "
            f"{shown(best.scores['merged']['average'], None, True)} % on the {self.split} sets, "
            f"{shown(best.normalized['average'], None, True)} % of the individual finetunes."
        )
        if not any(score.resampled for score in self._averaged(self.best)):
            return found
        level = self.level_with_best
        if not level:
            return f"{found} It is above every other method by more than the noise of the samples."
        names = "; ".join(level)
        return f"{found} The samples do not tell it from {names}: the 95 % interval of the difference includes 0."

    def section(self) -> dict[str, dict[str, Any]]:
        """What ``report.json`` has under ``"methods"``: by title, the method and its numbers."""
        return {
            title: {
                **comparison.method,
                "split": self.split,
                "scores": comparison.scores["merged"],
                "intervals": comparison.intervals["merged"],
                "normalized": comparison.normalized,
                **({"published": self.published[title]} if title in self.published else {}),
            }
            for title, comparison in self.by_title.items()
        }

    def _merged(self) -> dict[str, Mapping[str, float | None]]:
        return {title: comparison.scores["merged"] for title, comparison in self.by_title.items()}

    def _averaged(self, title: str) -> list[Score]:
        comparison = self.by_title[title]
        return [score for task in comparison.averaged if (score := comparison.merged[task]) is not None]
