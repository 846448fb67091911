"""`tune --search gradient` for a run: a Lightning fit of coefficients on the tasks' validation sets.

1. Each task's validation samples are halved: the fit's steps see one half, and its checks the other (`Halved`).
2. The parts of the merged weights are merged, one merge for each task (`tuning.parts`).
3. A Trainer of its own fits the coefficients (`tuning.learning`).
4. What was learned is kept in ``<run>/tune/learned.json``. A fit that was killed begins anew, with the same seed; one
   that ended is not run again, as long as settings, deltas and samples are the same.
5. The recipe with the learned coefficients and the configured one are measured on all validation samples.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_drm.evaluation import Candidates
from lightning_drm.fusion import Fusion, Recipe
from lightning_drm.modules import MultiTaskModule, batch_norms
from lightning_drm.storage import write_json
from lightning_drm.storage.json_files import read_object
from lightning_drm.training.halved import BATCH_SIZE, Endless, Halved
from lightning_drm.training.letting_go import let_go
from lightning_drm.training.run import Run
from lightning_drm.training.training_batches import TrainingBatches
from lightning_drm.tuning import (
    MONITOR,
    CoefficientFit,
    GradientSettings,
    Judge,
    Learned,
    Outcome,
    Parts,
    Trial,
    configured_coefficients,
    learned_setting,
    loss_of,
    problem_of,
    recipes_of_parts,
    stacked,
)

CHECK_EVERY = 10
"""Steps between two checks on the other half of the samples."""

LEARNED_FILE = "learned.json"

_HARDWARE = ("accelerator", "devices", "num_nodes", "plugins", "precision")


def learn_coefficients(
    run: Run,
    candidates: Candidates,
    folder: Path,
    *,
    methods: Sequence[str] | None,
    settings: GradientSettings,
    arguments: Mapping[str, Any],
    progress_bar: Callable[[str], list[Callback]],
) -> Outcome:
    """Learns the coefficients of a run's merge, and measures it on the validation sets.

    Args:
        run: The run.
        candidates: Makes and measures its merges.
        folder: Where what was learned is kept.
        methods: The name of the method, if it is not the configured one.
        settings: How they are learned.
        arguments: Arguments of the Trainer that trains; those about hardware hold here too. They are not changed.
        progress_bar: Makes the callbacks that show progress under a label.

    Raises:
        ValueError: If a method or task cannot be learned so; names all tasks that cannot.
    """
    recipe = learned_setting(candidates.recipe, methods, by_parameter=settings.by_parameter)
    Fusion(recipe, list(candidates.vectors.values()))  # refuses what does not fit, before anything is merged
    if isinstance(run.trainer.strategy.precision_plugin, HalfPrecision):
        raise ValueError(
            "Steps of a coefficient are lost in half precision: give --trainer.precision 32-true, or a mixed one."
        )
    run.interruptible.unfinished = "learning coefficients was"
    samples = Halved.of(run, settings.num_samples, settings.seed)
    stamps = run.stamps(candidates.tasks, "validation")
    made = json.dumps([repr(settings), recipe.description(candidates.tasks), stamps], sort_keys=True)
    digest, file = xxhash.xxh3_128(made.encode()).hexdigest(), folder / LEARNED_FILE
    stored = read_object(file) if file.is_file() else {}
    if stored.get("of") == digest:
        run.say("These coefficients were learned before.")
        learned = Learned.of_stored(stored)
    else:
        learned = _learn(run, candidates, recipe, samples, settings, arguments, progress_bar)
        write_json(file, {"of": digest, **learned.stored()})
    judge = Judge(candidates.measured_on("validation"), None)
    chosen, untuned = (_measured(judge, one) for one in (learned.recipe(recipe), candidates.recipe))
    return learned.outcome(settings, chosen, untuned)


def _learn(
    run: Run,
    candidates: Candidates,
    recipe: Recipe,
    samples: Halved,
    settings: GradientSettings,
    arguments: Mapping[str, Any],
    progress_bar: Callable[[str], list[Callback]],
) -> Learned:
    tasks = candidates.tasks
    model = candidates.model({})
    _refuse(model, samples.learned_from, settings)
    trained = {name for vector in candidates.vectors.values() for name in vector.deltas}
    norms = {
        task: [n for n in batch_norms(model.task_module(task)).items() if f"{n[0]}.running_mean" in trained]
        for task in tasks
    }
    estimated = {f"{name}.running_{what}" for found in norms.values() for name, _ in found for what in ("mean", "var")}
    of_tasks = _parts(candidates, recipe, model.task_modules[0].state_dict(), estimated)
    kinds = {name: kind for vector in candidates.vectors.values() for name, kind in vector.kinds.items()}
    start = configured_coefficients(recipe, {name: kinds[name] for name in of_tasks}, tasks)
    if settings.initial_coefficient is not None:
        start = {name: [settings.initial_coefficient] * len(tasks) for name in start}
    has_part = {name: part.reshape(len(part), -1).any(1).tolist() for name, part in of_tasks.items()}
    fit = CoefficientFit(
        model,
        Parts(of_tasks, start, by_parameter=settings.by_parameter),
        loss_of(settings.objective),
        learning_rate=settings.learning_rate,
        num_judged={task: number for task, (_, number) in samples.sizes.items()},
        batch_size=BATCH_SIZE,
        by_batch={task: [layer for _, layer in found] for task, found in norms.items()},
    )
    del of_tasks
    trainer = Trainer(
        **{name: arguments[name] for name in _HARDWARE if name in arguments},
        strategy=copy.deepcopy(arguments["strategy"]),  # which serves one Trainer
        max_steps=settings.max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=CHECK_EVERY,
        num_sanity_val_steps=0,
        callbacks=[EarlyStopping(MONITOR, patience=settings.patience), *(bar := progress_bar("learning"))],
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=False,
    )
    judging = list(samples.judged.values())
    with isolate_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Found .* in eval mode")  # as they are tested
        torch.manual_seed(settings.seed)  # for losses that draw
        trainer.validate(fit, judging, verbose=False)  # the start
        trainer.fit(fit, CombinedLoader({task: Endless(own) for task, own in samples.learned_from.items()}), judging)
        run.interruptible.check()
        if fit.checks[-1].step != trainer.global_step:
            trainer.validate(fit, judging, verbose=False)
    run.interruptible.check()
    assert fit.best is not None, "the start was judged"
    names, rows = fit.parts.names, fit.best[1].tolist()
    coefficients = dict(zip(names, rows if settings.by_parameter else rows * len(names), strict=True))
    learned = Learned(coefficients, tasks, has_part, fit.checks, samples.sizes)
    del fit, model, trainer
    let_go()  # the parts are as large as all models together
    return learned


@torch.no_grad()
def _refuse(model: MultiTaskModule, batches: Mapping[str, TrainingBatches], settings: GradientSettings) -> None:
    """Refuses tasks that have no such loss, all of them at once."""
    problems = []
    for task in model.task_names:
        problem = problem_of(model.task_module(task), next(iter(batches[task])), settings.objective)
        if problem is not None:
            problems.append(f"Task {task!r} {problem}")
    if problems:
        other = " (--objective labels learns from the tasks' own losses)" if settings.objective == "entropy" else ""
        raise ValueError(f"Coefficients cannot be learned by {settings.objective} here: {'; '.join(problems)}{other}.")


def _parts(candidates: Candidates, recipe: Recipe, order: Iterable[str], left_out: set[str]) -> dict[str, Tensor]:
    """By parameter's name, in an order, what each task adds."""
    models = [dict(deltas) for deltas in candidates.merged_side_by_side(recipes_of_parts(recipe, candidates.tasks))]
    found = stacked(models, [name for name in order if name not in left_out])
    if not found:
        raise ValueError("There is nothing to learn: under this recipe no task adds anything to the base.")
    return found


def _measured(judge: Judge, recipe: Recipe) -> Trial:
    return judge.measure(recipe, {}, lambda step, average: None)
