"""Tuning: a search on a sample of the validation sets, and the few best settings on all of their samples.

1. All settings of the search space are measured on a fixed, stratified sample of each task's validation set.
2. The best few, and the configured setting to compare with, are measured on all validation samples.
3. The best of these few is chosen: by its normalized average, and of equal ones the one that was better in step 1.

Test sets take no part. Cost: a decomposition for each matrix and each preparation of a method, a merge for each setting
apart from λ, and an evaluation on the sample for each setting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_drm.evaluation import Candidates
from lightning_drm.fusion import Fusion
from lightning_drm.tuning.judge import Judge
from lightning_drm.tuning.search import OnTrial, known_trials, search
from lightning_drm.tuning.settings import SearchSettings
from lightning_drm.tuning.space import Family, Params
from lightning_drm.tuning.study import Study, study_file
from lightning_drm.tuning.trial import Trial

STUDY_FILE = "study.db"


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
    on_trial: OnTrial,
) -> Tuned:
    """Searches for the setting whose merged model is best on the validation sets.

    Args:
        candidates: Makes and measures models.
        families: What is searched.
        folder: Where the study is kept.
        settings: How it is searched.
        measured: What scores depend on apart from the setting: hashes of deltas and of validation sets.
        on_trial: Called with the number of settings that were tried, of all that will be, and the best one.

    Raises:
        ValueError: If a setting does not fit, or no setting has an average.
    """
    _check(candidates, families)
    how: dict[str, object] = {"sampler": "tpe", "seed": settings.seed} if settings.sampler == "tpe" else {}
    with study_file(folder / STUDY_FILE) as storage:
        studies = [Study(family, storage, settings.num_samples, {**measured, **how}) for family in families]
        judge = Judge(
            candidates.measured_on("validation", settings.num_samples),
            settings.num_samples,
            num_best=settings.num_finalists,
            prune=settings.prune,
            known=known_trials(studies, settings),
        )
        trials = list(zip(families, search(studies, judge, settings, on_trial), strict=True))
        finished = [(trial, family) for family, found in trials for trial in found if trial.average is not None]
        finalists = sorted(finished, key=lambda pair: pair[0].reached, reverse=True)[: settings.num_finalists]
        full = Judge(candidates.measured_on("validation"), None)
        finals = [_on_all(Study(family, storage, None, measured), trial.params, full) for trial, family in finalists]
        finals.sort(key=lambda trial: trial.reached, reverse=True)
        untuned = next((trial for trial in finals if trial.recipe == candidates.recipe), None)
        if untuned is None:
            untuned = _on_all(Study(Family(candidates.recipe, {}), storage, None, measured), {}, full)
    return Tuned(trials, finals, untuned)


def _check(candidates: Candidates, families: Sequence[Family]) -> None:
    """Refuses families whose recipe does not fit the task vectors, all of them at once."""
    problems = []
    for family in families:
        try:
            Fusion(family.recipe, list(candidates.vectors.values()))
        except ValueError as error:
            problems.append(f"{family.title} cannot be searched: {str(error).removesuffix('.')}.")
    if problems:
        raise ValueError(" ".join(problems))


def _on_all(study: Study, params: Params, judge: Judge) -> Trial:
    return study.find(params) or study.try_out(params, judge)
