"""What a report, or a study's part of it, is about: so that numbers of different things never stand side by side."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Fingerprints = Mapping[str, str | None]


@dataclass(frozen=True)
class MadeFrom:
    """Fingerprints by task, which files note beside what they hold.

    Attributes:
        deltas: Those of the deltas.
        measured_on: Those of all that scores depend on beside the models: test samples, metric, settings of the module.
    """

    deltas: Fingerprints
    measured_on: Fingerprints

    def note(self, *, with_scores: bool = True) -> dict[str, Fingerprints]:
        """What a file notes.

        Args:
            with_scores: Whether it holds scores.
        """
        found = asdict(self)
        return found if with_scores else {"deltas": found["deltas"]}

    def holds_for(self, noted: Mapping[str, Any]) -> bool:
        """Whether a file is about the same, so far as it notes what it is about; it always notes the deltas.

        Args:
            noted: What the file holds.
        """
        return noted.get("deltas") == self.deltas and noted.get("measured_on", self.measured_on) == self.measured_on
