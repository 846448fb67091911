"""Kinds of task: what differs between classifying, rating, tagging and writing, one file each."""

from lightning_drm.kinds.choice import Choice
from lightning_drm.kinds.classification import Classification
from lightning_drm.kinds.columns import require_texts
from lightning_drm.kinds.entities import EntityF1
from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS, Kind
from lightning_drm.kinds.language import Language
from lightning_drm.kinds.metrics import MetricChoice, MetricInfo, TaskMetrics, check_choice, make_metrics, metrics_of
from lightning_drm.kinds.multi_label import MultiLabel
from lightning_drm.kinds.regression import Regression
from lightning_drm.kinds.sequence import SequenceToSequence
from lightning_drm.kinds.text_metrics import ExactMatch, Rouge, TokenAccuracy
from lightning_drm.kinds.tokens import Tokens

__all__ = [
    "IGNORE_INDEX",
    "LABELS",
    "Choice",
    "Classification",
    "EntityF1",
    "ExactMatch",
    "Kind",
    "Language",
    "MetricChoice",
    "MetricInfo",
    "MultiLabel",
    "Regression",
    "Rouge",
    "SequenceToSequence",
    "TaskMetrics",
    "TokenAccuracy",
    "Tokens",
    "check_choice",
    "make_metrics",
    "metrics_of",
    "require_texts",
]
