"""Measuring one task inside the merged module, with the task's own ``test_step`` or by its logits.

A module that has a ``score`` is measured by what its ``test_step`` (or ``on_test_epoch_end``) logs under that name; a
``test_`` before a logged name does not count. So is a module whose ``test_step`` logs ``accuracy``. Any other is
measured by its logits and targets: with the metric that its data bring, with its own ``metric``, or by micro accuracy.
Whatever the own test hooks log is logged too.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, MinMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_drm.data.sharing import Share, exactness_problem, num_replicas
from lightning_drm.kinds import IGNORE_INDEX, MetricInfo, TaskMetrics, make_metrics
from lightning_drm.modules.protocol import Classifies, classify
from lightning_drm.modules.sample_states import SampleRecorder, SampleStates

_LOG = signature(LightningModule.log)
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
    if score is None or (isinstance(score, str) and _has("test_step", module)):
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
        self._score: str = _plain_name(getattr(module, "score", None) or self.metrics.score)
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
        keep_precision(self.module)
        keep_precision(self.metrics)
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
                originals = stack.enter_context(_stand_ins(self.module))
            elif share.new != share.size:
                batch = self._shortened(batch, share)
            counts = share.new != 0
            if counts:
                for recorder in self._recorders.values():
                    stack.enter_context(recorder.listening(share))
            found: dict[str, tuple[Any, dict[str, Any]]] = {}
            if _has("test_step", self.module):
                with _logs_of(self.module, trainer, found):
                    _call(self.module, "on_test_batch_start", batch, batch_idx)
                    step = cast(Any, self.module).test_step
                    outputs = step(batch, batch_idx) if _takes_number(step) else step(batch)
                    _call(self.module, "on_test_batch_end", outputs, batch, batch_idx)
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
        found: dict[str, tuple[Any, dict[str, Any]]] = {}
        with _logs_of(self.module, trainer, found):
            _call(self.module, "on_test_epoch_end")
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
        if recorder is None:
            return None
        recorder.key = self._score
        return recorder.gathered()

    def hook(self, name: str, trainer: Any) -> None:
        """Calls one of the module's own hooks without arguments, if it has it."""
        with _logs_of(self.module, trainer, {}):
            _call(self.module, name)

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
            return _first(batch, share)
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
    if isinstance(module, Classifies) or not _has("test_step", module):
        classify(module, batch)
        return
    step = cast(Any, module).test_step
    with _stand_ins(module), _logs_of(module, None, {}):
        _ = step(batch, 0) if _takes_number(step) else step(batch)


def described(module: nn.Module) -> dict[str, Any]:
    """What tells one way of measuring a module from another.

    Args:
        module: A task's module, or a template of it.
    """
    own = {name: getattr(module, name, None) for name in ("score", "higher_is_better")}
    return {"own": own, **_metrics_on_logits(module).describe()}


def keep_precision(module: nn.Module) -> None:
    """Lets a module's metrics add up in double precision where a strategy has made half-precision numbers of them.

    Args:
        module: The module.
    """
    for metric in module.modules():
        if isinstance(metric, Metric):
            states = [value for value in metric._defaults.values() if isinstance(value, Tensor)]
            if any(state.dtype in (torch.float16, torch.bfloat16) for state in states):
                metric.set_dtype(torch.float32 if _device_of(module).type == "mps" else torch.float64)


def _device_of(module: nn.Module) -> torch.device:
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    metric = next((child for child in module.modules() if isinstance(child, Metric)), None)
    return first.device if first is not None else metric.device if metric is not None else torch.device("cpu")


def own_samples(module: LightningModule, batch: Any, batch_idx: int) -> tuple[Any, bool]:
    """A batch of a module's own validation or test without samples that repeat others for other processes.

    Args:
        module: The module. Inside the merged module, which has done this, batches are left as they are.
        batch: The batch.
        batch_idx: Its number.

    Returns:
        The batch, and whether it counts: one that repeats only is whole, as a sharded module needs all processes.

    Raises:
        ValueError: If samples cannot be left out.
    """
    trainer = module.trainer
    if trainer.lightning_module is not module:
        return batch, True
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    if isinstance(loaders, list | tuple):
        loaders = loaders[0]
    if not batch_idx and num_replicas(trainer) > 1 and (problem := exactness_problem(loaders)):
        raise ValueError(f"The evaluation loader {problem}.")
    share = Share.of(loaders, batch_idx)
    return (batch, share.new != 0) if share.new in (0, share.size) else (_first(batch, share), True)


def _metrics_on_logits(module: nn.Module) -> TaskMetrics:
    metric = getattr(module, OF_DATA, None) or getattr(module, "metric", None)
    if isinstance(metric, TaskMetrics):
        return metric
    if isinstance(metric, Metric | MetricCollection):
        return TaskMetrics(make_metrics(metric, {}))
    return TaskMetrics({_DEFAULT: MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX)})


def _plain_name(name: str) -> str:
    return name.removeprefix("test_").removeprefix("test/")


def _has(hook: str, module: nn.Module) -> bool:
    return isinstance(module, LightningModule) and is_overridden(hook, module)


def _takes_number(step: Callable[..., Any]) -> bool:
    """Whether a step takes a batch's number after the batch, which Lightning leaves to its author."""
    parameters = list(signature(step).parameters.values())
    return len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _call(module: nn.Module, hook: str, *args: Any) -> None:
    """Calls a hook of a task's own module as if the task were alone."""
    if not _has(hook, module):
        return
    method = getattr(module, hook)
    takes_loader = "dataloader_idx" in signature(method).parameters
    method(*args, **({"dataloader_idx": 0} if takes_loader else {}))


@contextmanager
def _logs_of(module: nn.Module, trainer: Any, found: dict[str, tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Collects what a module logs while it runs inside another one, by name without ``test_``, with its options."""
    if not isinstance(module, LightningModule):
        yield
        return

    def log(*args: Any, **kwargs: Any) -> None:
        given = _LOG.bind(module, *args, **kwargs).arguments
        options = {key: given[key] for key in ("batch_size", "reduce_fx") if given.get(key) is not None}
        found[_plain_name(given["name"])] = (given["value"], options)

    module.log = log  # type: ignore[method-assign]
    before, module.trainer = module._trainer, trainer
    try:
        yield
    finally:
        del module.__dict__["log"]
        module.trainer = before


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[dict[int, Metric]]:
    """Puts copies in the place of a module's metrics, which stay as they are; gives the originals by their ids."""
    originals: dict[int, Metric] = {}
    places = [
        (owner, name, child)
        for owner in module.modules()
        if not isinstance(owner, Metric | MetricCollection)
        for name, child in owner.named_children()
        if isinstance(child, Metric | MetricCollection)
    ]
    try:
        for owner, name, child in places:
            copy = child.clone()
            owner._modules[name] = copy
            originals |= {
                id(new): old
                for new, old in zip(copy.modules(), child.modules(), strict=True)
                if isinstance(old, Metric)
            }
        yield originals
    finally:
        for owner, name, child in places:
            owner._modules[name] = child


def _first(batch: Any, share: Share) -> Any:
    """The first samples of a batch.

    Raises:
        ValueError: If it holds something whose samples are not known.
    """

    def first(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) == share.size:
            return tensor[: share.new]
        if tensor.ndim:
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}")
        return tensor

    def is_samples(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == share.size and not _of_batches(value, share.size)

    if is_samples(batch):
        return batch[: share.new]
    if isinstance(batch, Mapping):
        return type(batch)({key: _first(value, share) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        parts = [_first(value, share) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    shortened = apply_to_collection(batch, Tensor, first)
    if shortened is batch and not isinstance(batch, int | float | str | bool | None | Tensor):
        raise ValueError(f"it holds a {type(batch).__name__}")
    return shortened


def _of_batches(values: Any, size: int | None) -> bool:
    """Whether a list holds whole batches, such as inputs and targets, and not one entry for each sample."""
    return any(isinstance(value, Tensor) and value.ndim and len(value) == size for value in values)
