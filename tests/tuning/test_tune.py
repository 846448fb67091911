"""The search: its scores are those of independent merges, work is shared, kills and pruning lose nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor

from helpers import reference
from helpers.own_method import Mixture
from helpers.studied import TASKS, StudiedRun, make_data
from helpers.tiny import VectorTask
from lightning_drm import DRM, TIES, Average, LiNeS, MultiTaskDataModule
from lightning_drm.fusion import Override, Recipe
from lightning_drm.training.candidates import RunCandidates
from lightning_drm.tuning import Family, SearchSettings, Tuned, search_space, tune
from lightning_drm.tuning.trial import Trial

GRID = {"DRM": {"density": [0.2, 0.6], "scale": [0.8, 1.0, 1.2, 1.4, -6.0]}}


def search(
    run: StudiedRun,
    folder: Path,
    families: Sequence[Family] | None = None,
    seen: list[Any] | None = None,
    **settings: Any,
) -> Tuned:
    def found(candidates: RunCandidates) -> Tuned:
        space = search_space(candidates.recipe, candidates.tasks, grid=GRID) if families is None else families
        notes = seen if seen is not None else []
        return tune(
            candidates,
            space,
            folder,
            SearchSettings(**{"num_samples": 60, **settings}),
            measured={},
            on_trial=lambda done, total, best: notes.append((done, total, best)),
        )

    return run.study(found)


def all_trials(found: Tuned) -> list[Trial]:
    return [trial for _, trials in found.trials for trial in trials]


def numbers(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    return [(dict(trial.params), dict(trial.values), trial.average) for trial in trials]


def merged_by_hand(candidates: RunCandidates, method: DRM) -> dict[str, Tensor]:
    """The merged deltas in float64, from full SVDs; what is no matrix is averaged."""
    vectors = list(candidates.vectors.values())
    merged = {}
    for name, kind in vectors[0].kinds.items():
        deltas = [torch.as_tensor(vector.deltas[name]).double() for vector in vectors]
        if kind == "matrix":
            merged[name] = reference.drm(deltas, **method.hyperparameters())
        else:
            merged[name] = method.scale * sum(deltas) / len(deltas)
    return merged


def accuracy_by_hand(
    candidates: RunCandidates, deltas: dict[str, Tensor], data: MultiTaskDataModule, task: str
) -> float:
    """The accuracy on all validation samples, by a plain loop in float64."""
    module = VectorTask(lr=0.3).double()
    weights = {**candidates.base_weights(), **candidates.vectors[task].head}
    weights |= {name: candidates.base_weights()[name].double() + delta for name, delta in deltas.items()}
    module.load_state_dict(weights)
    right = total = 0
    for x, y in data.tasks[task].val_dataloader():
        right += int((module(x.double()).argmax(1) == y).sum())
        total += len(y)
    return right / total


@pytest.fixture(scope="module")
def papers_grid(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, int, list[Any]]:
    """The paper's grid of DRM on all validation samples: what was found, decompositions, and what was reported."""
    seen: list[Any] = []

    def found(candidates: RunCandidates) -> tuple[Tuned, int]:
        families = search_space(candidates.recipe, candidates.tasks)
        settings = SearchSettings(num_samples=None, num_finalists=3, prune=False)
        folder = tmp_path_factory.mktemp("papers")
        tuned = tune(candidates, families, folder, settings, measured={}, on_trial=lambda *news: seen.append(news))
        return tuned, candidates._decompositions.num_decomposed

    return (*StudiedRun(finished, make_data()).study(found), seen)


def test_scores_are_those_of_independent_merges(papers_grid, run: StudiedRun):
    trials = all_trials(papers_grid[0])
    assert [(t.recipe.method.density, t.recipe.method.scale) for t in trials] == [
        (density / 10, scale / 10) for density in range(1, 11) for scale in range(8, 16)
    ]

    def by_hand(candidates: RunCandidates) -> None:
        own = {}
        for task in TASKS:
            deltas = {name: delta.double() for name, delta in candidates.of_task(task).items()}
            own[task] = accuracy_by_hand(candidates, deltas, run.data, task)
        for trial in trials[::9]:
            deltas = merged_by_hand(candidates, trial.recipe.method)
            scores = {task: accuracy_by_hand(candidates, deltas, run.data, task) for task in TASKS}
            assert trial.values == pytest.approx(scores, abs=1e-6)
            ratios = [scores[task] / own[task] for task in TASKS]
            assert trial.average == pytest.approx(sum(ratios) / len(ratios), abs=1e-6)

    run.study(by_hand)
    assert len({trial.average for trial in trials}) > 5, "settings that all score alike would prove nothing"


def test_lines_scales_what_was_merged_by_depth(run: StudiedRun, tmp_path: Path):
    """The network's three blocks with parameters are 0, 1 and 3; alpha is that of plain loops."""

    def found(candidates: RunCandidates) -> None:
        families = search_space(replace(candidates.recipe, method=LiNeS(DRM(density=0.2))), candidates.tasks)
        settings = SearchSettings(num_samples=None, prune=False)
        tuned = tune(candidates, families, tmp_path, settings, measured={}, on_trial=lambda *_: None)
        unscaled = merged_by_hand(candidates, DRM(density=0.2))
        vectors = candidates.vectors.values()
        summed = {n: sum(torch.as_tensor(vector.deltas[n]).double() for vector in vectors) for n in unscaled}
        alpha = sum(float(t.abs().sum()) for t in summed.values()) / len(vectors)
        alpha /= sum(float(t.abs().sum()) for t in unscaled.values())
        depths = {"backbone.0": 0.0, "backbone.1": 0.5, "backbone.3": 1.0}
        trials = all_trials(tuned)
        assert [trial.params for trial in trials] == [{"beta": tenth / 10} for tenth in range(1, 11)]
        for trial in trials:
            factors = {n: alpha + trial.params["beta"] * depths[n.rpartition(".")[0]] for n in unscaled}
            for name, delta in candidates.merged(trial.recipe).items():
                torch.testing.assert_close(delta.double(), factors[name] * unscaled[name], rtol=1e-4, atol=1e-7)
            by_hand = {n: factors[n] * delta for n, delta in unscaled.items()}
            scores = {task: accuracy_by_hand(candidates, by_hand, run.data, task) for task in TASKS}
            assert trial.values == pytest.approx(scores, abs=1e-6)
        assert len({trial.average for trial in trials}) > 3, "settings that all score alike would prove nothing"
        assert candidates._decompositions.num_decomposed == 2, "the network has two matrices"

    run.study(found)


def test_a_grid_of_80_points_decomposes_each_matrix_once(papers_grid):
    found, num_decomposed, _ = papers_grid
    assert len(all_trials(found)) == 80
    assert num_decomposed == 2, "the network has two matrices"


def test_the_best_of_all_is_chosen_and_the_best_so_far_is_told(papers_grid):
    found, _, seen = papers_grid
    trials = all_trials(found)
    averages = [trial.average for trial in trials]
    assert found.chosen.recipe == trials[averages.index(max(averages))].recipe
    assert [final.average for final in found.finals] == sorted(averages, reverse=True)[:3]
    assert found.untuned.recipe == Recipe(DRM())
    assert found.untuned.average == trials[[t.recipe for t in trials].index(Recipe(DRM()))].average
    assert [(done, total) for done, total, _ in seen] == [(done, 80) for done in range(81)]
    assert seen[0][2] is None
    assert [best.average for _, _, best in seen[1:]] == [max(averages[:done]) for done in range(1, 81)]


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A small grid without pruning."""
    return search(StudiedRun(finished, make_data()), tmp_path_factory.mktemp("whole"), prune=False, num_finalists=3)


@pytest.mark.parametrize("num_finalists", [1, 3])
def test_pruning_changes_neither_the_finalists_nor_the_best(
    whole: Tuned, run: StudiedRun, tmp_path: Path, num_finalists: int
):
    pruned = search(run, tmp_path, num_finalists=num_finalists)
    best = sorted(all_trials(whole), key=lambda trial: -trial.average)[:num_finalists]  # stable: first of equal ones
    finals = [final for final in whole.finals if final.params in [trial.params for trial in best]]
    assert numbers(pruned.finals) == numbers(finals)
    assert all(trial.average is not None for trial in all_trials(whole))
    given_up = [trial for trial in all_trials(pruned) if trial.average is None]
    assert given_up, "a grid with a λ of -6 has hopeless settings"
    assert all(len(trial.values) == 1 for trial in given_up)
    averages = {tuple(trial.params.items()): trial.average for trial in all_trials(whole)}
    limit = sorted(averages.values(), reverse=True)[num_finalists - 1]
    assert all(averages[tuple(trial.params.items())] <= trial.bound < limit for trial in given_up)


def test_trials_are_kept_and_those_that_were_pruned_are_measured_when_they_must(run: StudiedRun, tmp_path: Path):
    first = search(run, tmp_path, num_finalists=1)
    again: list[Any] = []
    assert numbers(all_trials(search(run, tmp_path, seen=again, num_finalists=1))) == numbers(all_trials(first))
    (study, *_) = stored(tmp_path, "60 samples")
    assert len(study.trials) == 10, "nothing was measured twice"
    whole = search(run, tmp_path, prune=False, num_finalists=1)
    assert all(trial.average is not None for trial in all_trials(whole))
    num_pruned = sum(trial.average is None for trial in all_trials(first))
    (study, *_) = stored(tmp_path, "60 samples")
    assert len(study.trials) == 10 + num_pruned
    assert optuna.logging.get_verbosity() == optuna.logging.INFO, "as it was"


def test_a_grid_that_grows_goes_on(run: StudiedRun, tmp_path: Path):
    recipe = Recipe(DRM())
    small = search_space(recipe, list(TASKS), grid={"DRM": {"density": [0.2, 0.6], "scale": [1.0]}})
    large = search_space(recipe, list(TASKS), grid={"DRM": {"density": [0.1, 0.2, 0.6], "scale": [1.0, 1.5]}})
    search(run, tmp_path, small, prune=False)
    found = search(run, tmp_path, large, prune=False)
    assert [tuple(trial.params.values()) for trial in all_trials(found)] == [
        (0.1, 1.0), (0.1, 1.5), (0.2, 1.0), (0.2, 1.5), (0.6, 1.0), (0.6, 1.5),
    ]  # fmt: skip
    (study, *_) = stored(tmp_path, "60 samples")
    assert len(study.trials) == 6


def test_what_scores_depend_on_has_a_study_of_its_own(run: StudiedRun, tmp_path: Path):
    point = {"DRM": {"density": [0.6], "scale": [1.0]}}
    for recipe in (Recipe(DRM()), Recipe(DRM(rank_drop=0.5)), Recipe(non_matrix="elect")):
        search(run, tmp_path, search_space(recipe, list(TASKS), grid=point), num_samples=20)
    assert len(stored(tmp_path, "20 samples")) == 3


def test_tpe_goes_on_as_if_it_had_not_stopped(run: StudiedRun, tmp_path: Path):
    options = {"sampler": "tpe", "seed": 3, "prune": False}
    whole = all_trials(search(run, tmp_path / "whole", num_trials=12, **options))
    search(run, tmp_path / "stopped", num_trials=4, **options)
    assert numbers(all_trials(search(run, tmp_path / "stopped", num_trials=12, **options))) == numbers(whole)
    assert len({tuple(trial.params.values()) for trial in whole}) == 12
    assert all(0.2 <= trial.params["density"] <= 0.6 and -6.0 <= trial.params["scale"] <= 1.4 for trial in whole)
    assert numbers(all_trials(search(run, tmp_path / "whole", num_trials=2, **options))) == numbers(whole[:2])
    other = search(run, tmp_path / "stopped", num_trials=1, **{**options, "seed": 4})
    assert numbers(all_trials(other)) != numbers(whole[:1])


def test_one_coefficient_for_each_task_by_tpe(run: StudiedRun, tmp_path: Path):
    families = search_space(Recipe(DRM()), list(TASKS), coefficients="each", grid={"DRM": {"scale": [0.0, 2.0]}})
    found = search(run, tmp_path, families, sampler="tpe", num_trials=3, prune=False)

    def again(candidates: RunCandidates) -> None:
        for trial in all_trials(found):
            assert trial.recipe.method == DRM(scale=1.0)
            assert set(trial.recipe.coefficients) == set(TASKS)
            deltas = candidates.measured_on("validation", 60)
            scores = deltas.scores(candidates.merged(trial.recipe), intervals=False)
            assert {task: score.value for task, score in scores.items()} == dict(trial.values)

    run.study(again)


def test_a_recipe_that_does_not_fit_is_refused_before_the_search(run: StudiedRun, tmp_path: Path):
    recipe = replace(Recipe(), overrides=[Override("*", density=0.5)])
    families = search_space(recipe, list(TASKS), methods=["TIES", "IsoC", "TSVM"])
    with pytest.raises(ValueError, match=r"IsoC cannot be searched: .* has no density.* TSVM cannot be searched"):
        search(run, tmp_path, families)
    assert not (tmp_path / "study.db").exists()


def test_a_method_of_ones_own_may_hold_others(run: StudiedRun):
    mixed = Mixture(TIES(), Average())
    run.trainer(method=mixed).tune(
        VectorTask(lr=0.3), run.data, grid={"helpers.own_method.Mixture": {"share": [0.1, 0.9]}}
    )
    found = pd.read_csv(run.folder / "tune" / "trials.csv")
    assert set(found["share"]) == {0.1, 0.5, 0.9}, "the configured one, too"
    recipe = yaml.safe_load((run.folder / "tune" / "best.yaml").read_text())["drm"]["method"]
    assert recipe["class_path"] == "helpers.own_method.Mixture"
    assert recipe["init_args"]["first"]["class_path"] == "lightning_drm.TIES"


def test_another_file_in_the_place_of_the_study_is_refused(run: StudiedRun, tmp_path: Path):
    (tmp_path / "study.db").write_text("something else")
    with pytest.raises(ValueError, match=r"study\.db is no SQLite file: remove it, and the search begins anew"):
        search(run, tmp_path)


def stored(folder: Path, name: str) -> list[optuna.Study]:
    """What another program reads from the file."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    return [optuna.load_study(study_name=n, storage=storage) for n in names if name in n]
