"""What Optuna keeps: one study for each family of settings and each choice of samples, in one SQLite file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import xxhash
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_drm.fusion.recipe import plain_value
from lightning_drm.storage import writing
from lightning_drm.tuning.judge import Judge
from lightning_drm.tuning.nesting import arguments_of, full_name
from lightning_drm.tuning.space import Family, Params
from lightning_drm.tuning.trial import Trial

_Key = frozenset[tuple[str, float]]
_FOUND = "found"
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def study_file(path: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Opens the file that holds all studies of a run; made if missing.

    Args:
        path: The SQLite file.

    Raises:
        ValueError: If it is something else.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size and not path.read_bytes()[:16].startswith(b"SQLite format 3"):
            raise ValueError(f"{path} is no SQLite file: remove it, and the search begins anew.")
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
    finally:
        optuna.logging.set_verbosity(before)


class Study:
    """The trials of one family on one choice of samples, as Optuna keeps them.

    Args:
        family: The family.
        storage: Where they are kept.
        num_samples: How many samples of each task they are measured on; ``None`` for all.
        measured: Everything else that a trial's scores depend on, and that is the same for all of the family.
    """

    def __init__(
        self,
        family: Family,
        storage: optuna.storages.BaseStorage,
        num_samples: int | None,
        measured: Mapping[str, object],
    ) -> None:
        self.family = family
        self._num_samples = num_samples
        method = family.recipe.method
        unsearched = {
            name: plain_value(value) for name, value in arguments_of(method).items() if name not in family.numbers
        }
        about = {**measured, **family.recipe.description([]), "class_path": full_name(method)}
        about |= {"init_args": unsearched, "searched": sorted(family.numbers)}
        about |= {"coefficients": dict(family.recipe.coefficients), "num_samples": num_samples}
        text = json.dumps(about, sort_keys=True)
        samples = "all samples" if num_samples is None else f"{num_samples} samples"
        name = f"{family.title}, {samples} ({xxhash.xxh3_64(text.encode()).hexdigest()})"
        self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        if not self._study.user_attrs:
            self._study.set_user_attr("measured", about)
        self._end_unfinished()
        self._num_done = 0
        self._trials: dict[_Key, Trial] = {}
        for stored in self._study.get_trials(states=_DONE):
            self._note(self._trial(stored))

    @property
    def trials(self) -> list[Trial]:
        """All trials; of those with the same numbers, the last one."""
        return list(self._trials.values())

    def find(self, params: Params) -> Trial | None:
        """The trial with some numbers, if there is one.

        Args:
            params: The numbers.
        """
        return self._trials.get(_key(params))

    def try_out(self, params: Params, judge: Judge) -> Trial:
        """Measures a setting of the family, and keeps what was found.

        Args:
            params: Its numbers.
            judge: Measures it.
        """
        steps: dict[int, float] = {}
        found = judge.measure(self.family.setting(params), params, steps.__setitem__)
        finished = create_trial(  # in one transaction: a kill before it leaves nothing
            state=_state(found),
            value=found.average,
            params=dict(params),
            distributions=self._distributions,
            intermediate_values=steps,
            user_attrs={_FOUND: _stored(found)},
        )
        self._study.add_trial(finished)
        self._note(found)
        return found

    def try_proposed(self, seed: int, judge: Judge) -> Trial:
        """Measures the setting that TPE proposes, and keeps what was found.

        Args:
            seed: Together with the number of trials, decides what is proposed.
            judge: Measures it.
        """
        self._study.sampler = TPESampler(seed=seed + self._num_done)
        asked = self._study.ask(self._distributions)

        def report(step: int, average: float) -> None:
            asked.report(average, step)

        found = judge.measure(self.family.setting(asked.params), asked.params, report)
        asked.set_user_attr(_FOUND, _stored(found))
        self._study.tell(asked, found.average, state=_state(found))
        self._note(found)
        return found

    def _note(self, trial: Trial) -> None:
        self._trials[_key(trial.params)] = trial
        self._num_done += 1

    @property
    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: _between(values) for name, values in self.family.numbers.items()}

    def _trial(self, stored: FrozenTrial) -> Trial:
        found: dict[str, Any] = stored.user_attrs[_FOUND]
        average = stored.value if stored.state == TrialState.COMPLETE else None
        return Trial(
            self.family.setting(stored.params), stored.params, average=average, num_samples=self._num_samples, **found
        )

    def _end_unfinished(self) -> None:
        """Ends trials that a kill left: they are no results."""
        for stored in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(stored.number, state=TrialState.FAIL)


def _stored(trial: Trial) -> dict[str, Any]:
    """What Optuna keeps of a trial beside its numbers and its average."""
    return {"values": dict(trial.values), "normalized": dict(trial.normalized), "bound": trial.bound}


def _state(trial: Trial) -> TrialState:
    return TrialState.PRUNED if trial.average is None else TrialState.COMPLETE


def _key(params: Params) -> _Key:
    return frozenset(params.items())


def _between(values: tuple[float, ...]) -> BaseDistribution:
    if all(isinstance(value, int) for value in values):
        return IntDistribution(int(min(values)), int(max(values)))
    return FloatDistribution(min(values), max(values))
