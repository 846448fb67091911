"""The search: settings are measured one after another, and Optuna keeps what was found.

1. Each `Family` has a study, whose name tells what was measured: which deltas, which samples, which settings apart from
   those that are searched. Trials of an earlier call are taken from it; one that a kill ended is not.
2. A grid is tried in its own order, in which λ changes first: such settings share a merged delta, and all settings of a
   family share decompositions. (Optuna's `GridSampler` shuffles.) A grid that grows goes on with what it has.
3. TPE (Bergstra et al., 2011) proposes numbers between the lowest and the highest value of the grid. Each proposal is
   seeded by its number, so that a search that was killed goes on as if it had not been.
4. `Judge` measures a setting task by task, and gives up the hopeless ones.
"""

from collections.abc import Callable, Sequence

from lightning_drm.tuning.judge import Judge
from lightning_drm.tuning.settings import SearchSettings
from lightning_drm.tuning.space import Params
from lightning_drm.tuning.study import Study
from lightning_drm.tuning.trial import Trial

OnTrial = Callable[[int, int, Trial | None], None]


def known_trials(studies: Sequence[Study], settings: SearchSettings) -> list[Trial]:
    """What earlier calls have found of the settings that `search` will try.

    Args:
        studies: As for `search`.
        settings: As for `search`.
    """
    wanted = ((study, params) for study in studies for params in _wanted(study, settings)[1])
    return [trial for study, params in wanted if (trial := study.find(params)) is not None]


def search(studies: Sequence[Study], judge: Judge, settings: SearchSettings, on_trial: OnTrial) -> list[list[Trial]]:
    """Tries settings of several families.

    Args:
        studies: One for each family.
        judge: Measures settings.
        settings: How settings are chosen.
        on_trial: Called with the number of trials that are done, of all that will be, and the best one.

    Returns:
        For each family its trials: of a grid in its own order, of TPE in the order of proposals.
    """
    wanted = [_wanted(study, settings) for study in studies]
    total, done = sum(max(num, len(points)) for num, points in wanted), 0
    found: list[list[Trial]] = []
    for study, (num, points) in zip(studies, wanted, strict=True):
        found.append([])
        for number in range(max(num, len(points))):
            on_trial(done, total, judge.best)
            known = study.find(points[number]) if number < len(points) else None
            if known is None or not judge.holds(known):
                propose = number >= len(points)
                known = study.try_proposed(settings.seed, judge) if propose else study.try_out(points[number], judge)
            found[-1].append(known)
            done += 1
    on_trial(done, total, judge.best)
    return found


def _wanted(study: Study, settings: SearchSettings) -> tuple[int, list[Params]]:
    """How many settings are tried, and those of them that are known before."""
    family = study.family
    if settings.sampler == "grid" or all(len(values) == 1 for values in family.numbers.values()):
        return len(family.points), family.points
    return settings.num_trials, [trial.params for trial in study.trials][: settings.num_trials]
