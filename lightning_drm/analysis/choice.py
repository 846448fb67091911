"""Which analyses are run: all, some by name, with default options or given ones."""

from collections.abc import Sequence

from lightning_drm.analysis.ablation import Ablation
from lightning_drm.analysis.alignment import Alignment
from lightning_drm.analysis.analysis import Analysis
from lightning_drm.analysis.conflicts import Conflicts
from lightning_drm.analysis.layers import Layers
from lightning_drm.analysis.pruning_profile import PruningProfile
from lightning_drm.analysis.sign_agreement import SignAgreement
from lightning_drm.analysis.spectrum import Spectrum
from lightning_drm.analysis.tasks import Tasks
from lightning_drm.analysis.trajectory import Trajectory

STANDARD: tuple[type[Analysis], ...] = (
    Ablation,
    Tasks,
    PruningProfile,
    SignAgreement,
    Spectrum,
    Alignment,
    Conflicts,
    Layers,
    Trajectory,
)
"""The analyses that are run if none are named, in this order."""


def chosen_analyses(only: str | Sequence[str] | None, given: Sequence[Analysis]) -> list[Analysis]:
    """The analyses that are asked for.

    Args:
        only: The names of those to run; all if left out.
        given: Analyses with options of their own. Each takes the place of the standard one of its name; any other is
            added.

    Raises:
        ValueError: If a name is unknown, or two of the given ones share a name.
    """
    names = [analysis.name for analysis in given]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The analysis {', '.join(twice)} is given more than once; its findings would share files.")
    known = {analysis.name: analysis for analysis in (*(standard() for standard in STANDARD), *given)}
    wanted = list(known) if only is None else [only] if isinstance(only, str) else list(only)
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"No analysis is called {', '.join(map(repr, unknown))}; there are: {', '.join(known)}.")
    return [analysis for name, analysis in known.items() if name in wanted]
