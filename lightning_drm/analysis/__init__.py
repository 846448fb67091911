"""The paper's studies on stored deltas: each one a class in a file of its own, with its options as arguments.

To add one, derive from `Analysis` and name the class in a configuration's ``analyses``, or add it to
`choice.STANDARD`.
"""

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.choice import STANDARD, chosen_analyses

__all__ = ["STANDARD", "Analysis", "OnStep", "chosen_analyses"]
