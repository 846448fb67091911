"""What a study found: a sentence, a table and a figure, as files that the report's page takes up."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_drm.evaluation.figures import write_svg
from lightning_drm.evaluation.made_from import MadeFrom
from lightning_drm.storage import write_json, write_text
from lightning_drm.storage.json_files import read_object


@dataclass(frozen=True)
class Finding:
    """The outcome of one study.

    Attributes:
        name: Its files' name, without an ending.
        title: What was studied, with the whole setting: "Rank drop (DRM, horizontal, density 0.2)".
        sentence: What was found, with the numbers.
        table: All numbers behind the figure, one row an observation, with units in the columns' names.
        figure: The figure.
    """

    name: str
    title: str
    sentence: str
    table: pd.DataFrame
    figure: Figure


@dataclass(frozen=True)
class StoredFinding:
    """A finding on disk.

    Attributes:
        name: Its files' name, without an ending.
        title: What was studied.
        sentence: What was found.
        table: The table's file.
        figure: The figure's file.
    """

    name: str
    title: str
    sentence: str
    table: Path
    figure: Path


def write_finding(finding: Finding, folder: Path, made_from: MadeFrom, *, with_scores: bool = True) -> StoredFinding:
    """Writes ``<name>.csv``, ``<name>.svg`` and, last, ``<name>.json``.

    Args:
        finding: What was found.
        folder: The folder; made if missing.
        made_from: What it is about.
        with_scores: Whether it depends on scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = _stored(folder, finding.name, finding.title, finding.sentence)
    write_text(stored.table, finding.table.to_csv(index=False))
    write_svg(finding.figure, stored.figure)
    about = {"title": finding.title, "sentence": finding.sentence, **made_from.note(with_scores=with_scores)}
    write_json(folder / f"{finding.name}.json", about)
    return stored


def read_findings(folder: Path, made_from: MadeFrom) -> list[StoredFinding]:
    """The findings of a folder about what a run has now, by name; those about older deltas or scores are left out.

    Args:
        folder: The folder; it may be missing.
        made_from: What the run has now.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        about = read_object(file)
        stored = _stored(folder, file.stem, str(about.get("title")), str(about.get("sentence")))
        if made_from.holds_for(about) and stored.table.is_file() and stored.figure.is_file():
            found.append(stored)
    return found


def _stored(folder: Path, name: str, title: str, sentence: str) -> StoredFinding:
    return StoredFinding(name, title, sentence, folder / f"{name}.csv", folder / f"{name}.svg")
