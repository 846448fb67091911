"""What analyses say of a model's scores: one number with its interval, and rows of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_drm.evaluation import Candidates, Comparison, Score
from lightning_drm.evaluation.figures import Point
from lightning_drm.evaluation.score import Interval

AVERAGE = "average"


@dataclass(frozen=True)
class Summary:
    """One number for a model of several tasks.

    Attributes:
        value: The average score of the tasks whose scores are fractions; where there are none, the average of the
            normalized scores.
        interval: Its 95 % interval, where it is known.
        what: Which of the two it is.
    """

    value: float
    interval: Interval | None
    what: str

    @property
    def point(self) -> Point:
        """What figures draw."""
        return self.value, self.interval

    def __str__(self) -> str:
        """In percent, with half of the interval: ``84.1 ±1.2 %``."""
        half = f" ±{50 * (self.interval[1] - self.interval[0]):.1f}" if self.interval is not None else ""
        return f"{100 * self.value:.1f}{half} %"


def comparison(candidates: Candidates, merged: Mapping[str, Score], tasks: Sequence[str] | None = None) -> Comparison:
    """A model's scores beside those of each task's own finetune.

    Args:
        candidates: Knows the finetunes.
        merged: The model's score by task.
        tasks: The tasks that count; all if left out.
    """
    return Comparison(list(candidates.tasks if tasks is None else tasks), {}, candidates.individual, merged, {})


def summary(compared: Comparison) -> Summary:
    """One number for a merged model.

    Args:
        compared: Its scores.

    Raises:
        ValueError: If no task has a score that could be averaged.
    """
    if (value := compared.scores["merged"][AVERAGE]) is not None:
        return Summary(value, compared.intervals["merged"][AVERAGE], "average score")
    if (value := compared.normalized[AVERAGE]) is not None:
        return Summary(value, None, "average normalized score")
    raise ValueError(
        f"None of the tasks {', '.join(compared.tasks)} has a score that is a fraction, or a finetune with a score "
        "above 0, so there is no average by which merges could be compared."
    )


def rows(compared: Comparison, labels: Mapping[str, object]) -> list[dict[str, object]]:
    """Rows of a table on a merged model: one for each task, and one for the average where there is one.

    Args:
        compared: Its scores.
        labels: What the first columns hold.
    """
    scores, intervals = compared.scores["merged"], compared.intervals["merged"]
    found = []
    for task in [*compared.tasks, AVERAGE]:
        info = compared.metrics.get(task)
        unit = "fraction" if info is None or info.is_fraction else "own unit"
        low, high = intervals[task] or (None, None)
        found.append(
            {
                **labels,
                "task": task,
                "metric": f"{info.name} ({unit})" if info is not None else unit,
                "score": scores[task],
                "score, 95 % from": low,
                "score, 95 % to": high,
                "normalized (fraction of the finetune's)": compared.normalized[task],
            }
        )
    return found


def points(difference: float, interval: Interval | None = None) -> str:
    """A difference of fractions, in words: ``+1.2 points``, or ``+1.2 ±0.8 points``.

    Args:
        difference: The difference.
        interval: Its 95 % interval, where it is known.
    """
    half = f" ±{50 * (interval[1] - interval[0]):.1f}" if interval is not None else ""
    return f"{100 * difference:+.1f}{half} points"
