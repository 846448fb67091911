"""Analyses of a user's own: one that fails, and one that is stopped by a signal."""

import signal
from collections.abc import Sequence

from lightning_drm.analysis import Analysis, OnStep
from lightning_drm.evaluation import Candidates, Finding


class Failing(Analysis):
    """Fails in the way it is asked to."""

    name = "failing"

    def __init__(self, by_bug: bool = False) -> None:
        self.by_bug = by_bug

    def run(self, candidates: Candidates, on_step: OnStep) -> Sequence[Finding]:
        raise (ZeroDivisionError if self.by_bug else ValueError)(f"nothing to say of {', '.join(candidates.tasks)}")


class Stopped(Analysis):
    """Gets the signal that a scheduler sends at the end of a job's time."""

    name = "stopped"

    def run(self, candidates: Candidates, on_step: OnStep) -> Sequence[Finding]:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal ends the run")
