"""What is measured of one task: metrics by name, of which one is the task's score."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_drm.kinds.metric_states import hangs

MetricChoice = str | dict[str, Any] | list[str | dict[str, Any]]
"""A torchmetrics class by its import path, alone or as ``{class_path: …, init_args: {…}}``, or a list of them."""

_ABOUT_TASKS = re.compile(r"^(Multiclass|Multilabel|Binary)(?=.)")


@dataclass(frozen=True)
class MetricInfo:
    """How to read a score.

    Attributes:
        name: The metric's name.
        higher_is_better: The metric's direction.
        is_fraction: Whether 1 is the best there can be, so that scores are shown in percent.
    """

    name: str
    higher_is_better: bool = True
    is_fraction: bool = False

    @classmethod
    def of(cls, name: str, metric: Metric | None, higher_is_better: bool | None = None) -> "MetricInfo":
        """How to read what a metric gives.

        Args:
            name: Its name.
            metric: The metric; ``None`` where only its name is known.
            higher_is_better: Its direction; the metric's own if left out, and higher where there is none.

        Example:
            >>> from torchmetrics.text import Perplexity
            >>> MetricInfo.of("perplexity", Perplexity())
            MetricInfo(name='perplexity', higher_is_better=False, is_fraction=False)
        """
        if higher_is_better is None:
            higher_is_better = getattr(metric, "higher_is_better", None) is not False
        bound = getattr(metric, "plot_upper_bound", None)
        return cls(name, higher_is_better, bound == 1 if metric is not None else name == "accuracy")


class TaskMetrics(nn.Module):
    """Metrics of one task, updated together; the first one's result is the task's score unless another is named.

    A metric whose result is a dictionary gives one result for each of its keys. Such a metric stands alone
    (``ROUGEScore``), or says its ``keys`` (`Rouge`).

    Args:
        metrics: Metrics by name.
        score: The result that is the score.
        higher_is_better: Its direction; the metric's own if left out, and higher where the metric has none.

    Attributes:
        score: The score's name.

    Raises:
        ValueError: If there is no metric, or none has such a result.

    Example:
        >>> from torch import tensor
        >>> from torchmetrics import MeanAbsoluteError, MeanSquaredError
        >>> metrics = TaskMetrics({"mse": MeanSquaredError(), "mae": MeanAbsoluteError()})
        >>> metrics.update(tensor([1.0, 2.0]), tensor([1.0, 4.0]))
        >>> metrics.results()
        {'mse': tensor(2.), 'mae': tensor(1.)}
        >>> metrics.score_info
        MetricInfo(name='mse', higher_is_better=False, is_fraction=False)
    """

    def __init__(
        self, metrics: Mapping[str, Metric], score: str | None = None, higher_is_better: bool | None = None
    ) -> None:
        super().__init__()
        if not metrics:
            raise ValueError("Expected at least one metric, got none.")
        self.metrics = nn.ModuleDict(metrics)
        self.score = score or next(iter(metrics))
        self._direction = higher_is_better
        _ = self.score_metric  # raises where none has such a result

    def update(self, predictions: Any, target: Any) -> None:
        """Adds a batch.

        Args:
            predictions: As the metrics take them.
            target: Likewise.

        Raises:
            ValueError: If a metric cannot take them, naming it.
        """
        for name, metric in self._items():
            try:
                metric.update(predictions, target)
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                shape = getattr(predictions, "shape", None)
                got = f"predictions of shape {tuple(shape)}" if shape is not None else type(predictions).__name__
                raise ValueError(
                    f"The metric {name!r} ({type(metric).__name__}) cannot measure this kind of task: it got {got}. "
                    f"{error}"
                ) from error

    def results(self) -> dict[str, Tensor]:
        """Every result by name, over all processes.

        Raises:
            ValueError: If one is not a single number, or cannot be computed by several processes together, or none is
                the score.
        """
        found: dict[str, Tensor] = {}
        for name, metric in self._items():
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and hangs(metric):
                raise ValueError(
                    f"The metric {name!r} ({type(metric).__name__}) keeps lists that torchmetrics gathers entry by "
                    "entry, so that several processes would wait in vain: use one, or a metric with sums, such as "
                    "lightning_drm.kinds.Rouge for ROUGE."
                )
            value = metric.compute()
            found |= value if isinstance(value, Mapping) else {name: value}
        for name, value in found.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
                raise ValueError(f"Expected a single number as the result of the metric {name!r}, got {shape}.")
        if self.score not in found:
            raise ValueError(f"Expected one of {', '.join(found)} as score, got {self.score!r}.")
        return {name: value.reshape(()) for name, value in found.items()}

    def reset(self) -> None:
        """Forgets all batches."""
        for _, metric in self._items():
            metric.reset()

    @property
    def score_metric(self) -> Metric:
        """The metric that the score is a result of."""
        for name, metric in self._items():
            if self.score in (name, *getattr(metric, "keys", ())) or len(self.metrics) == 1:
                return metric
        raise ValueError(f"Expected one of {', '.join(self.metrics)} as score, got {self.score!r}.")

    @property
    def score_info(self) -> MetricInfo:
        """How to read the score."""
        return MetricInfo.of(self.score, self.score_metric, self._direction)

    def describe(self) -> dict[str, Any]:
        """What tells these metrics from others: classes and settings."""
        settings = {
            name: {
                "class": type(metric).__qualname__,
                **{key: v for key, v in vars(metric).items() if key[0] != "_" and _is_plain(v)},
            }
            for name, metric in self._items()
        }
        return {"metrics": settings, "score": self.score, "higher_is_better": self._direction}

    def _items(self) -> list[tuple[str, Metric]]:
        return [(name, cast(Metric, metric)) for name, metric in self.metrics.items()]


def make_metrics(chosen: MetricChoice | Metric | MetricCollection, sizes: Mapping[str, Any]) -> dict[str, Metric]:
    """Fresh metrics by name.

    Args:
        chosen: Import paths with settings, or objects, of which copies are made.
        sizes: Settings that the data know (``num_classes``, …), for classes that take them and were not given them.

    Raises:
        ValueError: If one is no torchmetrics class, or cannot be made.

    Example:
        >>> make_metrics("torchmetrics.classification.MulticlassMatthewsCorrCoef", {"num_classes": 3})
        {'matthews_corr_coef': MulticlassMatthewsCorrCoef()}
    """
    if isinstance(chosen, MetricCollection):
        return {name: metric.clone() for name, metric in chosen.items()}
    if isinstance(chosen, Metric):
        return {metric_name(type(chosen)): chosen.clone()}
    metrics: dict[str, Metric] = {}
    for one in chosen if isinstance(chosen, list) else [chosen]:
        metric = _make(one, sizes)
        if (name := metric_name(type(metric))) in metrics:
            raise ValueError(f"Expected different metrics, got {name!r} twice: a MetricCollection can name them.")
        metrics[name] = metric
    return metrics


def metrics_of(data: object) -> TaskMetrics | None:
    """What a task's data module says is measured, afresh; ``None`` if it says nothing.

    Args:
        data: A data module; one that says so has a method ``metrics``.
    """
    make = getattr(data, "metrics", None)
    made = make() if callable(make) else None
    return made if isinstance(made, TaskMetrics) else None


def check_choice(chosen: MetricChoice | Metric | MetricCollection | None) -> None:
    """Refuses what is no torchmetrics class, before there are data to make it for.

    Args:
        chosen: As for `make_metrics`.

    Raises:
        ValueError: If one is not.
    """
    if chosen is not None and not isinstance(chosen, Metric | MetricCollection):
        for one in chosen if isinstance(chosen, list) else [chosen]:
            _class_and_settings(one)


def metric_name(kind: type[Metric]) -> str:
    """A class's name as results bear it.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> metric_name(MulticlassF1Score)
        'f1_score'
    """
    words = _ABOUT_TASKS.sub("", kind.__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", words).lower()


def _make(chosen: str | Mapping[str, Any], sizes: Mapping[str, Any]) -> Metric:
    path, make, arguments = _class_and_settings(chosen)
    known = inspect.signature(make).parameters
    arguments = {name: value for name, value in sizes.items() if name in known} | arguments
    try:
        metric = make(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"The metric {path} cannot be made with {arguments}: {error}") from error
    return metric


def _class_and_settings(chosen: str | Mapping[str, Any]) -> tuple[str, type[Metric], dict[str, Any]]:
    settings = {"class_path": chosen} if isinstance(chosen, str) else dict(chosen)
    path, arguments = settings.pop("class_path", None), settings.pop("init_args", None) or {}
    if not isinstance(path, str) or not isinstance(arguments, Mapping) or settings:
        raise ValueError(f"Expected a metric as {{class_path: …, init_args: {{…}}}}, got {chosen!r}.")
    return path, _imported(path), dict(arguments)


def _imported(path: str) -> type[Metric]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module or "torchmetrics"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Expected the path of a torchmetrics class as metric, got {path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise ValueError(f"Expected the path of a subclass of torchmetrics.Metric as metric, got {path!r}.")
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float | None)
