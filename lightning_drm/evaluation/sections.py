"""Sections of ``report.json`` that studies add: ``"methods"`` by `compare`, ``"tuned"`` by `tune`.

A section is kept in its study's folder, with the fingerprints of the deltas that it is about. Every report of the run
takes up the sections about the deltas as they are then. So a section outlives any later merge, and ends when a task is
finetuned again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_drm.storage import write_json
from lightning_drm.storage.json_files import read_object

Section = Literal["methods", "tuned"]

FOLDERS: Mapping[Section, str] = {"methods": "compare", "tuned": "tune"}
"""By section, its study's folder in the run folder."""

_FILE = "section.json"


def write_section(section: Section, content: Any, folder: Path, made_from: Mapping[str, str | None]) -> None:
    """Keeps a section for the reports of a run.

    Args:
        section: Its name in ``report.json``.
        content: What stands there.
        folder: The run folder.
        made_from: By task, the fingerprint of its deltas.
    """
    write_json(folder / FOLDERS[section] / _FILE, {"deltas": dict(made_from), section: content})


def read_sections(folder: Path, made_from: Mapping[str, str | None]) -> dict[str, Any]:
    """The sections about task vectors as they are now; those about older ones are left out.

    Args:
        folder: The run folder.
        made_from: By task, the fingerprint of its deltas.

    Raises:
        ValueError: If a section's file is damaged.
    """
    found: dict[str, Any] = {}
    for section, study in FOLDERS.items():
        file = folder / study / _FILE
        stored = read_object(file) if file.is_file() else {}
        if section in stored and stored.get("deltas") == dict(made_from):
            found[section] = stored[section]
    return found
