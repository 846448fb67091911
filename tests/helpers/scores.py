"""Scores for tests that are about what is done with them."""

from collections.abc import Mapping

from lightning_drm.evaluation import Score
from lightning_drm.kinds import MetricInfo

ACCURACY = MetricInfo("accuracy", is_fraction=True)


def scores(values: Mapping[str, float | None], metric: MetricInfo = ACCURACY) -> dict[str, Score | None]:
    """Scores by task, without intervals."""
    return {task: None if value is None else Score(value, metric) for task, value in values.items()}
