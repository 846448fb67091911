"""What studies add to ``report.json``: `compare` its ``"methods"``, `tune` what it ``"tuned"``.

Such a section is kept in its study's folder, with a note of what it is about. Every report of the run takes up the
sections about what the run has then. So a section outlives any later merge, and ends when a task is finetuned again, or
its scores are measured on other samples or by another metric.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_drm.evaluation.made_from import MadeFrom
from lightning_drm.storage import write_json
from lightning_drm.storage.json_files import read_object

Study = Literal["compare", "tune", "analysis"]
"""A study of merges, by its folder in the run folder."""

SECTIONS: Mapping[Study, str] = {"compare": "methods", "tune": "tuned"}
"""By study, what its section is called in ``report.json``."""

_FILE = "section.json"


def write_section(study: Study, content: Mapping[str, Any], folder: Path, made_from: MadeFrom) -> None:
    """Keeps a study's section for the reports of a run.

    Args:
        study: The study.
        content: What stands in the section.
        folder: The run folder.
        made_from: What it is about.
    """
    write_json(folder / study / _FILE, {**made_from.note(), SECTIONS[study]: dict(content)})


def read_sections(folder: Path, made_from: MadeFrom) -> dict[str, Any]:
    """The sections about what a run has now; those about older deltas or scores are left out.

    Args:
        folder: The run folder.
        made_from: What the run has now.

    Raises:
        ValueError: If a section's file is damaged.
    """
    found: dict[str, Any] = {}
    for study, name in SECTIONS.items():
        file = folder / study / _FILE
        stored = read_object(file) if file.is_file() else {}
        if name in stored and made_from.holds_for(stored):
            found[name] = stored[name]
    return found
