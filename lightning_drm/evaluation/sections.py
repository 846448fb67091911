"""What studies add to ``report.json``: `compare` its ``"methods"``, `tune` what it ``"tuned"``.

Such a section is kept in its study's folder, with the fingerprints of the deltas that it is about. Every report of the
run takes up the sections about the deltas as they are then. So a section outlives any later merge, and ends when a task
is finetuned again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_drm.storage import write_json
from lightning_drm.storage.json_files import read_object

Study = Literal["compare", "tune", "analysis"]
"""A study of merges, by its folder in the run folder."""

SECTIONS: Mapping[Study, str] = {"compare": "methods", "tune": "tuned"}
"""By study, what its section is called in ``report.json``."""

_FILE = "section.json"


def write_section(study: Study, content: Mapping[str, Any], folder: Path, made_from: Mapping[str, str | None]) -> None:
    """Keeps a study's section for the reports of a run.

    Args:
        study: The study.
        content: What stands in the section.
        folder: The run folder.
        made_from: By task, the fingerprint of its deltas.
    """
    write_json(folder / study / _FILE, {"deltas": dict(made_from), SECTIONS[study]: dict(content)})


def read_sections(folder: Path, made_from: Mapping[str, str | None]) -> dict[str, Any]:
    """The sections about task vectors as they are now; those about older ones are left out.

    Args:
        folder: The run folder.
        made_from: By task, the fingerprint of its deltas.

    Raises:
        ValueError: If a section's file is damaged.
    """
    found: dict[str, Any] = {}
    for study, name in SECTIONS.items():
        file = folder / study / _FILE
        stored = read_object(file) if file.is_file() else {}
        if name in stored and stored.get("deltas") == dict(made_from):
            found[name] = stored[name]
    return found
