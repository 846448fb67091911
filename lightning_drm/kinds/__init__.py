"""Kinds of task: what differs between classifying, rating, tagging and writing, one file each."""

from lightning_drm.kinds.choice import Choice
from lightning_drm.kinds.classification import Classification
from lightning_drm.kinds.entities import EntityF1
from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS, Kind
from lightning_drm.kinds.metrics import MetricChoice, MetricInfo, TaskMetrics, check_choice, make_metrics, metrics_of
from lightning_drm.kinds.multi_label import MultiLabel
from lightning_drm.kinds.regression import Regression
from lightning_drm.kinds.tokens import Tokens

__all__ = [
    "IGNORE_INDEX",
    "LABELS",
    "Choice",
    "Classification",
    "EntityF1",
    "Kind",
    "MetricChoice",
    "MetricInfo",
    "MultiLabel",
    "Regression",
    "TaskMetrics",
    "Tokens",
    "check_choice",
    "make_metrics",
    "metrics_of",
]
