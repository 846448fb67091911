r"""Measuring one setting, task by task, until it is plain that it cannot be among the best.

With :math:`s_t` the score of a setting on task t over that of the task's own finetune (the other way round where lower
is better), a setting's average over N tasks is :math:`\frac{1}{N} \sum_t s_t`. After some tasks it is at most

.. math:: \frac{1}{N} \Bigl( \sum_{\text{measured}} s_t + \sum_{\text{others}} \frac{1}{a_t} \Bigr)

with :math:`a_t` the finetune's own score, where 1 is the best score there can be, as of an accuracy; of other metrics
nothing is known before they are measured. A setting whose bound is below the k-th best average so far is pruned: it
would not have been among the k finalists. The bound is exact, so that pruning changes neither the finalists nor the
best setting. A bound from what was seen so far would prune more, and lose a setting that is the first to be good at
some task.

The order of the tasks decides how early that shows: those without a bound come first, then those that are furthest
from their best in the best setting so far.
"""

from collections.abc import Callable, Iterable
from math import inf, isnan

from lightning_drm.evaluation import Candidates, Comparison, Score
from lightning_drm.fusion import Recipe
from lightning_drm.tuning.space import Params
from lightning_drm.tuning.trial import Trial

ROUNDING = 1e-9  # sums in another order differ by less


class Judge:
    """Measures settings on one choice of validation samples, and knows the best ones.

    Args:
        candidates: Makes and measures models.
        num_samples: How many samples of each task they are measured on; ``None`` for all.
        num_best: How many settings are to be found: the k of the bound.
        prune: Whether settings are given up that cannot be among these.
        known: Trials of earlier calls, which count.

    Attributes:
        best: The best trial so far, the first one of equal ones.
    """

    def __init__(
        self,
        candidates: Candidates,
        num_samples: int | None,
        *,
        num_best: int = 1,
        prune: bool = False,
        known: Iterable[Trial] = (),
    ) -> None:
        self._candidates = candidates
        self._num_samples = num_samples
        self._num_best = num_best
        self._prune = prune
        self._averages: list[float] = []
        self.best: Trial | None = None
        for trial in known:
            self._note(trial)

    def holds(self, trial: Trial) -> bool:
        """Whether a stored trial tells all that is to be known: it was finished, or would be pruned again."""
        return trial.average is not None or (self._prune and self._is_hopeless(trial.bound))

    def measure(self, recipe: Recipe, params: Params, report: Callable[[int, float], None]) -> Trial:
        """Measures a setting.

        Args:
            recipe: The setting.
            params: Its numbers.
            report: Called with the number of tasks that are measured, and their normalized average.

        Raises:
            ValueError: If the recipe does not fit, or no task's scores have a ratio.
        """
        deltas = self._candidates.merged(recipe)
        scores: dict[str, Score] = {}
        order = self._order()
        for place, task in enumerate(order, 1):
            scores |= self._candidates.scores(deltas, [task], intervals=False)
            normalized = self._comparison(scores).normalized
            report(place, normalized["average"] or 0.0)
            bound = self._bound(scores, order[place:])
            if place < len(order) and self._prune and self._is_hopeless(bound):
                return self._trial(recipe, params, scores, None, bound)
        average = normalized["average"]
        if average is None:
            raise ValueError(
                "No task's score can be compared with its finetune's, which is 0 on the validation samples: use more "
                "samples, or finetune longer."
            )
        average = -inf if isnan(average) else average
        trial = self._trial(recipe, params, scores, average, average)
        self._note(trial)
        return trial

    def _trial(
        self, recipe: Recipe, params: Params, scores: dict[str, Score], average: float | None, bound: float
    ) -> Trial:
        measured = [task for task in self._candidates.tasks if task in scores]
        values, normalized = {task: scores[task].value for task in measured}, self._comparison(scores).normalized
        ratios = {task: normalized[task] for task in measured}
        return Trial(recipe, params, values, ratios, average, bound, self._num_samples)

    def _note(self, trial: Trial) -> None:
        if trial.average is None:
            return
        self._averages = sorted([*self._averages, trial.average], reverse=True)[: self._num_best]
        if self.best is None or trial.reached > self.best.reached:
            self.best = trial

    def _is_hopeless(self, bound: float) -> bool:
        return len(self._averages) == self._num_best and bound < self._averages[-1] - ROUNDING

    def _bound(self, scores: dict[str, Score], rest: list[str]) -> float:
        """The highest average that a setting can still have."""
        normalized = self._comparison(scores).normalized
        known = [ratio for task in scores if (ratio := normalized[task]) is not None]
        possible = [*known, *(limit for task in rest if (limit := self._limit(task)) is not None)]
        return sum(possible) / len(possible) if possible else inf

    def _limit(self, task: str) -> float | None:
        """The highest normalized score of a task; ``None`` if it can have none."""
        own = self._candidates.individual[task]
        if not own.metric.higher_is_better:
            return inf
        if own.value <= 0:
            return None
        return 1 / own.value if own.metric.is_fraction else inf

    def _order(self) -> list[str]:
        def room(task: str) -> float:
            limit = self._limit(task)
            reached = self.best.normalized.get(task) if self.best is not None else None
            return -1.0 if limit is None else limit - (reached or 0.0)

        return sorted(self._candidates.tasks, key=room, reverse=True)

    def _comparison(self, scores: dict[str, Score]) -> Comparison:
        return Comparison(self._candidates.tasks, {}, self._candidates.individual, scores, {})
