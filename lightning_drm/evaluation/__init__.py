"""Per-task scores, the comparison of base, individual and merged models, and the report."""

from lightning_drm.evaluation.comparison import Comparison
from lightning_drm.evaluation.linear_probe import linear_probe
from lightning_drm.evaluation.measure import measure
from lightning_drm.evaluation.report import logged_metrics, markdown, report_content, terminal_table, write_report
from lightning_drm.evaluation.score import Score, bootstrap_interval

__all__ = [
    "Comparison",
    "Score",
    "bootstrap_interval",
    "linear_probe",
    "logged_metrics",
    "markdown",
    "measure",
    "report_content",
    "terminal_table",
    "write_report",
]
