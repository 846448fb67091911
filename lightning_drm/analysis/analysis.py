"""What an analysis is: a study of stored deltas, whose options are its constructor's arguments."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from lightning_drm.evaluation import Candidates, Finding

OnStep = Callable[[int, int], None]
"""Called with how many steps of an analysis are done, and how many there are."""


class Analysis(ABC):
    """A study of some tasks' deltas and of the models that are made of them.

    A subclass takes its options in `__init__` and implements `run`. It is chosen by its `name`, or by its class where
    options are given.

    Attributes:
        name: What it is called; its findings' names begin with it.
        needs_scores: Whether it measures models. Those that do not never load data.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False

    def problems(self, candidates: Candidates) -> list[str]:
        """Why the options do not fit these tasks, one sentence for each reason; looks at names and shapes only.

        Args:
            candidates: The task vectors.
        """
        return []

    def unavailable(self, candidates: Candidates) -> str | None:
        """Why these tasks cannot be studied so, whatever the options; ``None`` if they can.

        Args:
            candidates: The task vectors.
        """
        return None

    @abstractmethod
    def run(self, candidates: Candidates, on_step: OnStep) -> Sequence[Finding]:
        """Studies some tasks.

        Args:
            candidates: The task vectors, the models that recipes make of them, and those models' scores.
            on_step: Called after each step.

        Returns:
            What was found: one finding, or several where a figure cannot show it all.
        """
