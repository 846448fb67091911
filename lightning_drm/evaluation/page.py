"""``report.html``: all that a run folder knows, on one page that needs no other file and no network.

The page is written after the files that it shows: ``report.json``, ``report.svg``, ``config.yaml``, and the findings in
the folders of the studies. So whoever changes one of them writes the page again.
"""

import base64
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_drm.evaluation.finding import StoredFinding, read_findings
from lightning_drm.evaluation.made_from import MadeFrom
from lightning_drm.evaluation.page_commands import commands
from lightning_drm.evaluation.page_tables import PageTable, finding_table, main_table, methods_table, tuned_table
from lightning_drm.evaluation.sections import Study
from lightning_drm.storage import write_text
from lightning_drm.storage.json_files import read_object

MAX_BYTES = 2_000_000
"""The largest page that is written while there is something to leave out."""

STUDIES: Mapping[Study, str] = {"compare": "Methods", "tune": "Tuning", "analysis": "Analyses"}
"""By folder of a study, its heading."""

_PACKAGES = ("lightning_drm", "torch", "lightning", "transformers")


@dataclass(frozen=True)
class _Shown:
    """A finding on the page: ``None`` stands for what would make the page too large."""

    finding: StoredFinding
    figure: str | None
    table: PageTable | None

    @property
    def weight(self) -> int:
        """Bytes of its figure."""
        return len(self.figure or "")


def write_page(folder: Path, made_from: MadeFrom) -> None:
    """Writes ``report.html`` from what a run folder has.

    Args:
        folder: The run folder.
        made_from: What the run has now; findings about anything else are left out.

    Raises:
        ValueError: If a file that the page shows is damaged.
    """
    file = folder / "report.json"
    report: dict[str, Any] = read_object(file) if file.is_file() else {"tasks": list(made_from.deltas)}
    studies = {study: [_shown(finding) for finding in read_findings(folder / study, made_from)] for study in STUDIES}
    page = _rendered(folder, report, studies)
    while len(page.encode()) > MAX_BYTES and (smaller := _without_the_largest(studies)):
        studies = smaller
        page = _rendered(folder, report, studies)
    write_text(folder / "report.html", page)


def _shown(finding: StoredFinding) -> _Shown:
    fits = finding.table.stat().st_size < MAX_BYTES
    return _Shown(finding, _data_address(finding.figure), finding_table(finding.table) if fits else None)


def _without_the_largest(studies: Mapping[Study, list[_Shown]]) -> dict[Study, list[_Shown]] | None:
    """The same without the largest table; without the largest figure once there are no tables; ``None`` at the end."""
    everything = [item for items in studies.values() for item in items]
    tables = [item for item in everything if item.table is not None]
    figures = [item for item in everything if item.figure is not None]
    if tables:
        largest = max(tables, key=lambda item: item.finding.table.stat().st_size)
        without = replace(largest, table=None)
    elif figures:
        largest = max(figures, key=lambda item: item.weight)
        without = replace(largest, figure=None)
    else:
        return None
    return {study: [without if item is largest else item for item in items] for study, items in studies.items()}


def _rendered(folder: Path, report: Mapping[str, Any], studies: Mapping[Study, list[_Shown]]) -> str:
    environment = Environment(
        loader=PackageLoader("lightning_drm.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=_title(report),
        summary=_summary(report),
        main=main_table(report) if "scores" in report else None,
        picture=_data_address(folder / "report.svg") if "scores" in report else None,
        methods=methods_table(report) if "methods" in report else None,
        tuned=tuned_table(report) if "tuned" in report and "scores" in report else None,
        studies={STUDIES[study]: (study, items) for study, items in studies.items()},
        recipe=report.get("method"),
        method=_method(report) if "method" in report else None,
        commands=commands(folder / "config.yaml", report),
        versions={**{name: version(name) for name in _PACKAGES}, "Python": platform.python_version()},
    )


def _data_address(figure: Path) -> str | None:
    """A figure as the address of an image that the page itself holds."""
    if not figure.is_file():
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(figure.read_bytes()).decode()}"


def _method(report: Mapping[str, Any]) -> str:
    return str(report.get("title") or report["method"]["class_path"].rpartition(".")[2])  # older reports have no title


def _title(report: Mapping[str, Any]) -> str:
    tasks = f"{len(report['tasks'])} tasks"
    return f"{tasks} merged with {_method(report)}" if "method" in report else f"{tasks}, merged in several ways"


def _summary(report: Mapping[str, Any]) -> str:
    """The numbers of the main table in a sentence."""
    if "scores" not in report:
        return "No merged model was tested yet: run `lightning-drm merge`."
    averages = {row: scores["average"] for row, scores in report["scores"].items()}
    parts = [
        f"{100 * averages[row]:.1f}\u00a0% {row}"
        for row in ("merged", "individual", "base")
        if averages[row] is not None
    ]
    kept = report["normalized"]["average"]
    sentences = [f"The average score on the test sets: {', '.join(parts)}."] if parts else []
    if kept is not None:
        sentences.append(f"The merged model keeps {100 * kept:.1f}\u00a0% of what the individual finetunes reach.")
    return " ".join(sentences) or "Scores are in the table."
