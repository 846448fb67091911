"""What a model card says in its metadata, as far as it can be read: cards are written by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def metadata_of(folder: Path | None) -> Mapping[str, Any]:
    """The metadata of the model card in a folder; empty where there is none, or none that can be read."""
    if folder is None or not (folder / "README.md").is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        found: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    except (ValueError, OSError):  # no metadata, or not YAML
        return {}
    return found
