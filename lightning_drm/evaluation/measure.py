"""Measuring a multi-task module with a Trainer of its own, so that no other Trainer's state is touched."""

import time
from collections.abc import Mapping
from math import isclose
from typing import Any, Literal

import numpy as np
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_drm.evaluation.score import NUM_RESAMPLES, Score, percentile_interval, resample
from lightning_drm.modules import MultiTaskModule, SampleStates

Split = Literal["validation", "test"]

_PATIENCE = 60.0  # seconds that an interval may take: slow metrics have it from few sets of samples, or none
_FEW = 100
_TIMED = 5  # sets by which the time of all is judged
_HARDWARE = (
    "accelerator",
    "devices",
    "inference_mode",
    "limit_test_batches",
    "num_nodes",
    "plugins",
    "precision",
    "strategy",
)


def measure(
    module: MultiTaskModule,
    data: LightningDataModule,
    arguments: Mapping[str, Any],
    callbacks: list[Callback],
    *,
    intervals: bool = True,
    split: Split = "test",
) -> dict[str, Score]:
    """Tests a module on the test or validation sets of its tasks.

    Args:
        module: The module; its tasks are in the order of the test dataloaders.
        data: The data module.
        arguments: Arguments of a Trainer, of which those about hardware and test sets are used.
        callbacks: Callbacks of the test, such as a progress bar.
        intervals: Whether scores get their intervals.
        split: On which samples; ``limit_test_batches`` holds for both.

    Returns:
        By task, the score with its interval.
    """
    trainer = Trainer(
        **{name: arguments[name] for name in _HARDWARE if name in arguments},
        limit_val_batches=arguments.get("limit_test_batches"),
        callbacks=callbacks,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=DummyLogger(),  # for test steps that draw: nothing is kept
    )
    module.record_samples = intervals
    run = trainer.test if split == "test" else trainer.validate
    run(module, datamodule=data, verbose=False)
    module.record_samples = False
    if unseen := [task for task in module.task_names if f"score/{task}" not in trainer.callback_metrics]:
        raise ValueError(
            f"Nothing was measured of {', '.join(unseen)}: does limit_test_batches leave any test batches?"
        )
    return {task: _score(module, task, float(trainer.callback_metrics[f"score/{task}"])) for task in module.task_names}


def _affordable(samples: SampleStates, seconds_of_one: float) -> int:
    """How many sets may be drawn. What one takes more than the others, such as stacking, does not count for all."""
    if seconds_of_one > _PATIENCE:
        return 0
    start = time.perf_counter()
    resample(samples, _TIMED)
    each = max(0.0, time.perf_counter() - start - seconds_of_one) / (_TIMED - 1)
    return next((number for number in (NUM_RESAMPLES, _FEW) if number * each < _PATIENCE), 0)


def _score(module: MultiTaskModule, task: str, value: float) -> Score:
    samples, resampled = module.samples(task), list[float]()
    if samples is not None:
        start = time.perf_counter()
        again = samples.results([np.arange(len(samples))])[0]
        seconds = time.perf_counter() - start
        # Of a metric whose samples do not make its result again, other sets of samples would say nothing either.
        if isclose(again, value, rel_tol=1e-3):
            resampled = resample(samples, _affordable(samples, seconds))
    return Score(value, module.metric_of(task), percentile_interval(resampled) if resampled else None, resampled)
