"""What any search hands on to be tested and reported, however it has searched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_drm.evaluation import Finding
from lightning_drm.tuning.trial import Trial


@dataclass(frozen=True)
class Outcome:
    """What a search has found.

    Attributes:
        chosen: The best setting, on all validation samples.
        untuned: The configured setting on the same samples.
        trials: Every setting that was measured, for the table of trials.
        sentence: How it was chosen, and what it gains on validation.
        findings: Its pictures.
        about: What ``report.json`` says of the search itself.
        hints: Where else to look.
    """

    chosen: Trial
    untuned: Trial
    trials: Sequence[Trial]
    sentence: str
    findings: Sequence[Finding]
    about: Mapping[str, Any]
    hints: Sequence[str] = ()
