"""Tuning: a search on a sample of the validation sets, and the few best settings on all of their samples.

1. All settings of the search space are measured on a fixed, stratified sample of each task's validation set.
2. The best few, and the configured setting to compare with, are measured on all validation samples.
3. The best of these few is chosen: by its normalized average, and of equal ones the one that was better in step 1.

Test sets take no part. Cost: a decomposition for each matrix and each preparation of a method, a merge for each setting
apart from λ, and an evaluation on the sample for each setting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_drm.evaluation import Candidates
from lightning_drm.fusion import Recipe
from lightning_drm.tuning.judge import Judge
from lightning_drm.tuning.search import Progress, Sampler, Study, known_trials, search, study_file
from lightning_drm.tuning.space import Family
from lightning_drm.tuning.trial import Trial

STUDY_FILE = "study.db"


@dataclass(frozen=True)
class SearchSettings:
    """How settings are searched.

    Attributes:
        sampler: ``"grid"`` tries all, ``"tpe"`` proposes some.
        num_trials: How many TPE proposes of each family.
        seed: Decides what TPE proposes.
        num_samples: How many validation samples of each task measure a setting; ``None`` for all.
        num_finalists: How many settings are measured on all of them.
        prune: Whether settings are given up that cannot be among the finalists.

    Raises:
        ValueError: If a number is out of range; lists all that are.
    """

    sampler: Sampler = "grid"
    num_trials: int = 100
    seed: int = 0
    num_samples: int | None = 100
    num_finalists: int = 5
    prune: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {lowest}, got {value}"
            for name, value, lowest in (
                ("num_trials", self.num_trials, 1),
                ("num_samples", self.num_samples, 1),
                ("num_finalists", self.num_finalists, 1),
                ("seed", self.seed, 0),
            )
            if value is not None and value < lowest
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        trials: Each family, with what was measured on the sample in the order of the search.
        finals: The finalists on all validation samples, the best one first.
        untuned: The configured setting on all validation samples.
    """

    trials: Sequence[tuple[Family, Sequence[Trial]]]
    finals: Sequence[Trial]
    untuned: Trial

    @property
    def chosen(self) -> Trial:
        """The best setting, on all validation samples."""
        return self.finals[0]


def tune(
    candidates: Candidates,
    families: Sequence[Family],
    folder: Path,
    settings: SearchSettings,
    *,
    measured: Mapping[str, object],
    progress: Progress,
) -> Tuned:
    """Searches for the setting whose merged model is best on the validation sets.

    Args:
        candidates: Makes and measures models.
        families: What is searched.
        folder: Where the study is kept.
        settings: How it is searched.
        measured: What scores depend on apart from the setting: hashes of deltas and of validation sets.
        progress: Called with the number of settings that were tried, of all that will be, and the best one.

    Raises:
        ValueError: If a setting does not fit, or no setting has an average.
    """
    how: dict[str, object] = {"sampler": "tpe", "seed": settings.seed} if settings.sampler == "tpe" else {}
    wanted = {"sampler": settings.sampler, "num_trials": settings.num_trials}
    with study_file(folder / STUDY_FILE) as storage:
        studies = [Study(family, storage, settings.num_samples, {**measured, **how}) for family in families]
        judge = Judge(
            candidates.measured_on("validation", settings.num_samples),
            settings.num_samples,
            num_best=settings.num_finalists,
            prune=settings.prune,
            known=known_trials(studies, **wanted),
        )
        trials = search(studies, judge, seed=settings.seed, progress=progress, **wanted)
        finalists = sorted(
            ((trial, family) for family, found in zip(families, trials, strict=True) for trial in found if trial.average is not None),
            key=lambda finalist: -finalist[0].average,
        )[: settings.num_finalists]
        full = Judge(candidates.measured_on("validation"), None)
        finals = [_on_all(Study(family, storage, None, measured), trial.params, full) for trial, family in finalists]
        finals.sort(key=lambda trial: -trial.average)
        own = Family(candidates.recipe, {})
        untuned = next((trial for trial in finals if trial.recipe == candidates.recipe), None)
        untuned = untuned or _on_all(Study(own, storage, None, measured), {}, full)
    return Tuned(list(zip(families, trials, strict=True)), finals, untuned)


def _on_all(study: Study, params: Params, judge: Judge) -> Trial:
    return study.find(params) or study.try_out(params, judge)
