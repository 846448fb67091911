"""Per-task scores, the comparison of base, individual and merged models, and the report."""

from lightning_drm.evaluation.candidates import Candidates, Deltas
from lightning_drm.evaluation.comparison import Comparison
from lightning_drm.evaluation.finding import Finding, StoredFinding, read_findings, write_finding
from lightning_drm.evaluation.linear_probe import linear_probe
from lightning_drm.evaluation.made_from import MadeFrom
from lightning_drm.evaluation.measure import Split, measure
from lightning_drm.evaluation.page import write_page
from lightning_drm.evaluation.picture import report_figure
from lightning_drm.evaluation.predictions import Predictions, RecordPredictions
from lightning_drm.evaluation.published import Published
from lightning_drm.evaluation.report import (
    add_section,
    logged_metrics,
    markdown,
    notes,
    report_content,
    terminal_table,
    write_report,
)
from lightning_drm.evaluation.score import Interval, Score, paired_interval
from lightning_drm.evaluation.sections import Study
from lightning_drm.evaluation.shown import shown

__all__ = [
    "Candidates",
    "Comparison",
    "Deltas",
    "Finding",
    "Interval",
    "MadeFrom",
    "Predictions",
    "Published",
    "RecordPredictions",
    "Score",
    "Split",
    "StoredFinding",
    "Study",
    "add_section",
    "linear_probe",
    "logged_metrics",
    "markdown",
    "measure",
    "notes",
    "paired_interval",
    "read_findings",
    "report_content",
    "report_figure",
    "shown",
    "terminal_table",
    "write_finding",
    "write_page",
    "write_report",
]
