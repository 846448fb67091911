"""Measuring one task inside the merged module, with the task's own ``test_step`` or by its logits.

A module that has a ``score`` is measured by what its ``test_step`` (or ``on_test_epoch_end``) logs under that name; a
``test_`` before a logged name does not count. So is a module whose ``test_step`` logs ``accuracy``. Any other is
measured by its logits and targets: with the metric that its data bring, with its own ``metric``, or by micro accuracy.
Whatever the own test hooks log is logged too.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, MinMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_drm.data.sharing import Share
from lightning_drm.kinds import IGNORE_INDEX, MetricInfo, TaskMetrics, make_metrics
from lightning_drm.kinds.metric_states import keep_precision
from lightning_drm.modules.counted_samples import first_samples
from lightning_drm.modules.own_hooks import (
    Logged,
    call_hook,
    has_hook,
    logs_of,
    metric_stand_ins,
    plain_name,
    run_step,
)
from lightning_drm.modules.protocol import Classifies, classify
from lightning_drm.modules.sample_states import SampleRecorder, SampleStates

_DEFAULT = "accuracy"

OF_DATA = "metrics_of_data"
"""The attribute of a user's own module in which the metrics are that its task's data bring."""

EQUAL: dict[str, Any] = {"reduce_fx": "max", "sync_dist": True}
"""Lightning's options to log a number that all processes have, so that it stays as it is."""


_REDUCTIONS: dict[str, type[Metric]] = {"mean": MeanMetric, "sum": SumMetric, "max": MaxMetric, "min": MinMetric}

Log = Callable[[str, Metric | Tensor], None]
"""Takes a name, and a metric or a number that all processes have."""


def unmeasurable(module: nn.Module) -> str | None:
    """Why a module's score cannot be measured, as far as its class shows; ``None`` if nothing speaks against it.

    Args:
        module: A task's module.
    """
    score = getattr(module, "score", None)
    if score is None or (isinstance(score, str) and has_hook("test_step", module)):
        return None
    kind = type(module).__name__
    if not isinstance(score, str):
        return f"Expected the name of a metric that its test_step logs as {kind}.score, got {score!r}."
    return f"{kind} names {score!r} as its score, but has no test_step that could log it: define one."


class Measurement:
    """How one task is measured.

    Args:
        task: The task's name.
        module: Its module.
    """

    def __init__(self, task: str, module: nn.Module) -> None:
        self.task = task
        self.module = module
        self.metrics = _metrics_on_logits(module)
        self.info: MetricInfo | None = None
        self._score: str = plain_name(getattr(module, "score", None) or self.metrics.score)
        self._recorders: dict[int, SampleRecorder] = {}
        self._scored: Any = None
        self._logged: dict[str, None] = {}
        self._seen = False
        self._reductions: dict[str, Metric] = {}
        self._by_own: bool | None = None

    def start(self, *, record: bool) -> None:
        """Begins anew.

        Args:
            record: Whether each sample's part in the score is recorded.
        """
        self._logged, self._scored, self._reductions, self._seen = {}, None, {}, False
        self._by_own = True if getattr(self.module, "score", None) is not None else None
        if isinstance(getattr(self.module, OF_DATA, None), TaskMetrics):
            self._by_own = False
        for metric in (*self.module.modules(), *self.metrics.modules()):
            if isinstance(metric, Metric):
                metric.reset()  # of what came before: a metric that is logged as a number stays as it is
        for owner in (self.module, self.metrics):
            keep_precision(owner, _device_of(self.module))
        self._recorders = {id(metric): SampleRecorder(metric) for metric in self._recorded()} if record else {}

    def measure(self, batch: Any, batch_idx: int, share: Share, log: Log, trainer: Any) -> None:
        """Measures one batch.

        Args:
            batch: The batch.
            batch_idx: Its number.
            share: Which of its samples count.
            log: Where results go.
            trainer: The Trainer.

        Raises:
            ValueError: If the task cannot be measured, or repeated samples cannot be told from others.
        """
        self._seen = True
        with ExitStack() as stack:
            originals: dict[int, Metric] = {}
            if share.new == 0:
                originals = stack.enter_context(metric_stand_ins(self.module))
            elif share.new != share.size:
                batch = self._shortened(batch, share)
            counts = share.new != 0
            if counts:
                for recorder in self._recorders.values():
                    stack.enter_context(recorder.listening(share))
            found: Logged = {}
            if has_hook("test_step", self.module):
                with logs_of(self.module, trainer, found):
                    call_hook(self.module, "on_test_batch_start", batch, batch_idx)
                    outputs = run_step(self.module, "test_step", batch, batch_idx)
                    call_hook(self.module, "on_test_batch_end", outputs, batch, batch_idx)
            if self._by_own is None:
                self._by_own = self._score in found
            if not self._by_own:
                self._by_logits(batch, counts)
                found |= {name: (metric, {}) for name, metric in self.metrics.metrics.items()}
        if not counts and batch_idx:  # other batches of this process have logged these names
            return
        for name, (value, options) in found.items():
            if isinstance(value, Metric):
                self._log(name, originals.get(id(value), value), log)
                continue
            reduction = self._reduction(name, options.get("reduce_fx", "mean"), value)
            if counts and isinstance(reduction, MeanMetric):
                reduction.update(value, options.get("batch_size") or share.new or extract_batch_size(batch))
            elif counts:
                reduction.update(value)
            self._log(name, reduction, log)

    def finish(self, log: Log, trainer: Any, all_gather: Callable[[Tensor], Any]) -> None:
        """Calls the module's own hook at the end of the test set, and checks that there is a score.

        Args:
            log: Where results go.
            trainer: The Trainer.
            all_gather: Gathers a number from all processes.

        Raises:
            ValueError: If there is none, or processes disagree on a number.
        """
        found: Logged = {}
        with logs_of(self.module, trainer, found):
            call_hook(self.module, "on_test_epoch_end")
        for name, (value, _) in found.items():
            if isinstance(value, Metric):
                self._log(name, value, log)
                continue
            number = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            number = number.detach().to(_device_of(self.module))
            everywhere = all_gather(number)
            if not torch.equal(everywhere.nan_to_num(), number.nan_to_num().expand_as(everywhere)):
                raise ValueError(
                    f"Task {self.task!r} logs {name!r} at the end of its test set as a number that differs between "
                    "processes, as each has seen a part of the set: log a torchmetrics Metric instead."
                )
            self._log(name, number, log)
        if not self._seen:
            raise ValueError(f"Task {self.task!r} cannot be measured: its test set has no batch.")
        if self._score not in self._logged:
            logged = ", ".join(self._logged) or "nothing"
            raise ValueError(f"Task {self.task!r} is to be judged by {self._score!r}, but its test_step logs {logged}.")
        metric = self._own_metric()
        self.info = MetricInfo.of(self._score, metric, getattr(self.module, "higher_is_better", None))

    def samples(self) -> SampleStates | None:
        """Each sample's part in the score, on all processes together; ``None`` if that is not known."""
        metric = self._own_metric()
        recorder = self._recorders.get(id(metric))
        return recorder.gathered(self._score) if recorder is not None else None

    def hook(self, name: str, trainer: Any) -> None:
        """Calls one of the module's own hooks without arguments, if it has it."""
        with logs_of(self.module, trainer, {}):
            call_hook(self.module, name)

    def _log(self, name: str, value: Metric | Tensor, log: Log) -> None:
        if name == "score" != self._score:
            raise ValueError(
                f"Task {self.task!r} logs {name!r}, under which each task's score is logged: give it another name."
            )
        self._logged[name] = None
        log(f"{name}/{self.task}", value)
        if name == self._score:
            self._scored = value
            log(f"score/{self.task}", value)

    def _reduction(self, name: str, asked: Any, value: Any) -> Metric:
        """The metric that makes one number of those that batches log. Lightning's own rounds the batches' sizes."""
        if name not in self._reductions:
            kind = _REDUCTIONS.get(asked if isinstance(asked, str) else getattr(asked, "__name__", ""))
            if kind is None:
                raise ValueError(
                    f"Task {self.task!r} logs {name!r} with reduce_fx={asked!r}; expected {', '.join(_REDUCTIONS)}."
                )
            # A diverged model must not look healthy.
            self._reductions[name] = kind(nan_strategy=math.nan).to(_device_of(self.module))
        return self._reductions[name]

    def _by_logits(self, batch: Any, counts: bool) -> None:
        logits, target = classify(self.module, batch)
        if set(self.metrics.metrics) == {_DEFAULT} and (
            logits.ndim != 2 or target.ndim != 1 or target.is_floating_point()
        ):
            raise ValueError(
                f"Task {self.task!r} cannot be measured by accuracy, the default: it takes logits (batch, classes) and "
                f"class numbers (batch,), but its module gives {tuple(logits.shape)} and {target.dtype} "
                f"{tuple(target.shape)}. Give {type(self.module).__name__} a `score`: the name of a metric that its "
                "test_step logs."
            )
        if counts:
            self.metrics.update(logits, target)

    def _recorded(self) -> list[Metric]:
        """The metrics that may turn out to be the score's."""
        if (metric := self._score_metric()) is not None:
            return [metric]
        own = [child for child in self.module.modules() if isinstance(child, Metric)]
        return [*own, self.metrics.score_metric]

    def _own_metric(self) -> Metric | None:
        """The metric whose result the score is, where it is known."""
        is_metric = isinstance(self._scored, Metric) and self._scored is not self._reductions.get(self._score)
        return self._scored if is_metric else self._score_metric()

    def _score_metric(self) -> Metric | None:
        """The metric behind a score that is logged as a number, which `TransformerTask` knows."""
        metric = getattr(self.module, "score_metric", None)
        return metric if isinstance(metric, Metric) else None

    def _shortened(self, batch: Any, share: Share) -> Any:
        """A batch without the samples that repeat others."""
        try:
            return first_samples(batch, share)
        except ValueError as error:
            raise ValueError(
                f"Task {self.task!r}: the last batch repeats samples for other processes, and cannot be shortened to "
                f"its first {share.new} of {share.size}: {error}. Choose a number of processes that divides "
                "the test set, or batches of tensors with the samples in the first dimension."
            ) from error


def run_forward(module: nn.Module, batch: Any) -> None:
    """Lets a batch go through a module, as its test would.

    Args:
        module: A task's module; its metrics stay as they are.
        batch: The batch.

    Raises:
        TypeError: If the module has neither ``classify`` nor a ``test_step``, and the batch is not a pair.
    """
    if isinstance(module, Classifies) or not has_hook("test_step", module):
        classify(module, batch)
        return
    with metric_stand_ins(module), logs_of(module, None, {}):
        run_step(module, "test_step", batch, 0)


def described(module: nn.Module) -> dict[str, Any]:
    """What tells one way of measuring a module from another.

    Args:
        module: A task's module, or a template of it.
    """
    own = {name: getattr(module, name, None) for name in ("score", "higher_is_better")}
    return {"own": own, **_metrics_on_logits(module).describe()}


def _device_of(module: nn.Module) -> torch.device:
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    metric = next((child for child in module.modules() if isinstance(child, Metric)), None)
    return first.device if first is not None else metric.device if metric is not None else torch.device("cpu")


def _metrics_on_logits(module: nn.Module) -> TaskMetrics:
    metric = getattr(module, OF_DATA, None) or getattr(module, "metric", None)
    if isinstance(metric, TaskMetrics):
        return metric
    if isinstance(metric, Metric | MetricCollection):
        return TaskMetrics(make_metrics(metric, {}))
    return TaskMetrics({_DEFAULT: MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX)})
