"""Per-task scores, the comparison of base, individual and merged models, and the report."""

from lightning_drm.evaluation.candidates import Candidates, Deltas
from lightning_drm.evaluation.comparison import Comparison
from lightning_drm.evaluation.finding import Finding, StoredFinding, read_findings, write_finding
from lightning_drm.evaluation.linear_probe import linear_probe
from lightning_drm.evaluation.measure import Split, measure
from lightning_drm.evaluation.report import (
    add_section,
    logged_metrics,
    markdown,
    report_content,
    terminal_table,
    write_report,
)
from lightning_drm.evaluation.score import Score, bootstrap_interval

__all__ = [
    "Candidates",
    "Comparison",
    "Deltas",
    "Finding",
    "Score",
    "Split",
    "StoredFinding",
    "add_section",
    "bootstrap_interval",
    "linear_probe",
    "logged_metrics",
    "markdown",
    "measure",
    "read_findings",
    "report_content",
    "terminal_table",
    "write_finding",
    "write_report",
]
