"""Models that are tried out in memory: what they are made of, and their scores, against plain loops and real runs."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.tiny import QUIET, Vectors, VectorTask
from lightning_drm import DRM, TIES, Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule, TaskArithmetic
from lightning_drm.training.candidates import RunCandidates
from lightning_drm.training.run import Run

ARGUMENTS = {**QUIET, "max_epochs": 2, "limit_val_batches": 0}


class Validated(Vectors):
    """Vectors that are validated on the last third of the training samples, and tested on others."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(self.train, range(40, 64)), batch_size=10)


class Normed(VectorTask):
    """A network with batch norm, whose statistics a merge must estimate again."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.backbone[1] = nn.BatchNorm1d(8)


DATA = {"a": 1, "b": 2, "c": 3}


def trainer_of(folder: Path, **drm: object) -> MergeTrainer:
    return MergeTrainer(**ARGUMENTS, callbacks=[DRMMergeCallback(list(DATA), dirpath=folder, **drm)])


def data() -> MultiTaskDataModule:
    return MultiTaskDataModule({task: Validated(seed) for task, seed in DATA.items()})


@pytest.fixture(scope="module", params=[VectorTask, Normed])
def run_of(request, tmp_path_factory) -> tuple[Path, Callable[[], VectorTask]]:
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder, method=DRM(density=0.5)).fit(request.param(seed=3), datamodule=data())
    return folder, lambda: request.param(seed=3)


def studied(run_of, function: Callable[[Run, RunCandidates], object], **options: object) -> object:
    folder, module = run_of
    return trainer_of(folder, method=DRM(density=0.5))._study(module(), data(), function, **options)


def accuracy(module: nn.Module, batches: DataLoader) -> float:
    module = copy.deepcopy(module).eval()
    right = [(module(x).argmax(1) == y) for x, y in batches]
    return float(torch.cat(right).float().mean())


def test_scores_on_the_test_sets_are_those_that_the_fit_reported(run_of):
    report = json.loads((run_of[0] / "report.json").read_text())["scores"]

    def study(run: Run, candidates: RunCandidates) -> None:
        merged = candidates.scores(candidates.merged(candidates.recipe))
        for row, scores in (("merged", merged), ("individual", candidates.individual), ("base", candidates.base)):
            assert {task: score.value for task, score in scores.items()} == {task: report[row][task] for task in DATA}
            assert all(score.interval is not None for score in scores.values())

    studied(run_of, study, split="test")


def test_scores_on_the_validation_sets_are_those_of_a_plain_loop(run_of):
    def study(run: Run, candidates: RunCandidates) -> None:
        deltas = candidates.merged(replace(candidates.recipe, method=TIES(0.4)))
        model = candidates.model(deltas, ["c", "a"])
        assert model.task_names == ["c", "a"]
        scores = candidates.scores(deltas, ["c", "a"], intervals=False)
        for task, score in scores.items():
            plain = accuracy(model.task_module(task), Validated(DATA[task]).val_dataloader())
            assert score.value == pytest.approx(plain, abs=1e-6)
            assert score.interval is None

    studied(run_of, study)


def test_merges_are_those_of_the_session(run_of):
    def study(run: Run, candidates: RunCandidates) -> None:
        base = candidates.base_weights()
        for method in (DRM(density=0.5, scale=1.7), TIES(0.3), Average(), DRM(density=0.2), DRM(density=0.2, scale=0)):
            recipe = replace(candidates.recipe, method=method, coefficients={"a": 0.5})
            deltas = candidates.merged(recipe)
            merged = run.session.fuse(recipe=recipe, module=run.modules.make_known()).task_module("b")
            for name, weight in merged.state_dict().items():
                if name in deltas:
                    torch.testing.assert_close(base[name] + deltas[name], weight, rtol=0, atol=1e-6)

    studied(run_of, study)


def test_another_scale_is_not_merged_again(run_of):
    def study(run: Run, candidates: RunCandidates) -> None:
        name = "backbone.0.weight"
        one = candidates.merged(replace(candidates.recipe, method=DRM(scale=1.0)))[name]
        assert candidates.merged(replace(candidates.recipe, method=DRM(scale=1.0)))[name] is one
        half = candidates.merged(replace(candidates.recipe, method=DRM(scale=0.5)))[name]
        assert torch.equal(half, 0.5 * one)
        assert candidates.merged(replace(candidates.recipe, method=DRM(density=0.9)))[name] is not one
        assert candidates.merged(replace(candidates.recipe, coefficients={"a": 0.0}))[name] is not one

    studied(run_of, study)


def test_some_of_the_tasks_are_merged_as_if_there_were_no_others(run_of):
    def study(run: Run, candidates: RunCandidates) -> None:
        recipe = replace(candidates.recipe, method=TaskArithmetic(1.0), coefficients={"a": 0.5, "c": 9.0})
        two = candidates.merged(recipe, {task: candidates.vectors[task] for task in ("a", "b")})
        for name, delta in two.items():
            expected = 0.5 * candidates.of_task("a")[name] + candidates.of_task("b")[name]
            torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-7)
        side_by_side = list(candidates.merged_side_by_side([recipe, candidates.recipe]))
        assert len(side_by_side) == 2
        for name, delta in candidates.merged(recipe).items():
            assert torch.equal(side_by_side[0][name], delta)

    studied(run_of, study)


def test_a_model_may_mix_deltas_and_heads(run_of):
    def study(run: Run, candidates: RunCandidates) -> None:
        own = candidates.of_task("a")
        name = "backbone.0.weight"
        mixed = candidates.model({name: own[name]}, heads=dict.fromkeys(DATA, candidates.vectors["a"].head))
        base = candidates.base_weights()
        module = mixed.task_module("b")
        assert torch.equal(module.backbone[0].weight, base[name] + own[name])
        assert torch.equal(module.backbone[3].weight, base["backbone.3.weight"])
        assert torch.equal(module.head.weight, candidates.vectors["a"].head["head.weight"])

    studied(run_of, study)


def test_a_sample_of_the_validation_sets_is_the_same_each_time(run_of):
    def study(run: Run, candidates: RunCandidates) -> list[int]:
        return [len(loader.dataset) for loader in candidates.data(list(DATA)).val_dataloader()], candidates.scores(
            candidates.of_task("a"), intervals=False
        )

    first, again = (studied(run_of, study, num_samples=9) for _ in range(2))
    assert first == again
    assert first[0] == [9, 9, 9]


def test_what_cannot_be_studied_is_said(run_of, tmp_path):
    folder, module = run_of
    without = MultiTaskDataModule({task: Vectors(seed) for task, seed in DATA.items()})
    with pytest.raises(ValueError, match="a, b, c: the data have no val_dataloader"):
        trainer_of(folder)._study(module(), without, lambda run, candidates: None)
    with pytest.raises(ValueError, match="has no finetune of a, b, c: run `fit` first"):
        trainer_of(tmp_path)._study(module(), data(), lambda run, candidates: None)
    with pytest.raises(ValueError, match="num_samples chooses samples of the validation sets"):
        trainer_of(folder).analyze(module(), data(), split="test", num_samples=5)
    for setting in ({"seed": 0}, {"num_trials": 5}):
        with pytest.raises(ValueError, match=f"The search 'grid' does not take {next(iter(setting))}"):
            trainer_of(folder).tune(module(), data(), **setting)
    two = MergeTrainer(**ARGUMENTS, devices=2, callbacks=[DRMMergeCallback(list(DATA), dirpath=folder)])
    with pytest.raises(ValueError, match=r"Merges are studied on one device, got 2: give --trainer\.devices 1"):
        two._study(module(), data(), lambda run, candidates: None)
