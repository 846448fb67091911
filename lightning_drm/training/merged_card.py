"""A merged model's scores in its model card: for people a table, and for model hubs the metadata that they read."""

from pathlib import Path
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lightning_drm.evaluation import Comparison
from lightning_drm.evaluation.comparison import ROWS
from lightning_drm.storage import write_text

_TITLE = "## Scores"
_TASK_TYPE = "other"  # the hub knows kinds of models; what a task's data are, only its user does


def add_scores(path: Path, comparison: Comparison) -> None:
    """Writes test scores into a model card, in place of those that it has.

    Args:
        path: The card, as `model_card` made it.
        comparison: The scores.
    """
    card = ModelCard(path.read_text(encoding="utf-8"))
    data = cast(ModelCardData, card.data)
    metrics, scores = comparison.metrics, comparison.scores
    data.model_name = f"{len(comparison.tasks)} tasks merged with {comparison.method_title}"
    data.eval_results = [
        EvalResult(
            task_type=_TASK_TYPE,
            dataset_type=task,
            dataset_name=task,
            dataset_split="test",
            metric_type=metrics[task].name,
            metric_value=value,
        )
        for task in comparison.tasks
        if (value := scores["merged"][task]) is not None
    ]
    rows = [
        [task, metrics[task].name, *(_shown(scores[row][task]) for row in ROWS), _shown(comparison.normalized[task])]
        for task in comparison.tasks
    ]
    table = [["task", "score", *ROWS, "normalized"], ["---"] * (len(ROWS) + 3), *rows]
    text = card.text.partition(_TITLE)[0].rstrip()
    lines = [f"| {' | '.join(row)} |" for row in table]
    card.text = "\n".join([text, "", f"{_TITLE} (test sets)", "", *lines, ""])
    write_text(path, str(card))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
