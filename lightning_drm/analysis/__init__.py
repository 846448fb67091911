"""The paper's studies on stored deltas: each one a class in a file of its own, with its options as arguments.

To add one, derive from `Analysis` and name the class in a configuration's ``analyses``, or add it to
`choice.STANDARD`.
"""

from lightning_drm.analysis.ablation import Ablation
from lightning_drm.analysis.alignment import Alignment
from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.choice import STANDARD, chosen_analyses
from lightning_drm.analysis.conflicts import Conflicts
from lightning_drm.analysis.layers import Layers
from lightning_drm.analysis.pruning_profile import PruningProfile
from lightning_drm.analysis.sign_agreement import SignAgreement
from lightning_drm.analysis.spectrum import Spectrum
from lightning_drm.analysis.tasks import Tasks
from lightning_drm.analysis.trajectory import Trajectory

__all__ = [
    "STANDARD",
    "Ablation",
    "Alignment",
    "Analysis",
    "Conflicts",
    "Layers",
    "OnStep",
    "PruningProfile",
    "SignAgreement",
    "Spectrum",
    "Tasks",
    "Trajectory",
    "chosen_analyses",
]
