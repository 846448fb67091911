"""A run that tests of the command line share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A configuration of two tasks, finetuned in a few steps each, and the run folder."""

    config: Path
    folder: Path

    @property
    def words(self) -> list[str]:
        """What a command line says of it."""
        return ["--config", str(self.config), "--drm.dirpath", str(self.folder)]
