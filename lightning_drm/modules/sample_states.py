"""What a metric makes of each sample of a test set, so that its result on any choice of samples is known.

A metric's states are sums over samples, or lists, for most metrics: then each sample's own states are kept, and states
of any choice are their sums or lists. For the others, such as Pearson's correlation, each sample's inputs are kept.
Either way a result costs no forward pass of the model. Under several processes each records its own samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lightning_drm.data.sharing import Share
from lightning_drm.kinds.metric_states import adds_up, alone

Choice = Sequence[int] | NDArray[np.signedinteger]
"""Numbers of samples, which may repeat."""

_TOGETHER = 1 << 22
"""How many counts of samples, or entries of summed states, are in memory together."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class SampleStates:
    """What a metric needs of each sample of a test set, in the set's order.

    Args:
        metric: A copy of the metric on the CPU, updated before, which computes anew each time it is asked.
        samples: For each sample the metric's states, or the arguments of its update.
        key: The result that counts, for a metric with several.
    """

    metric: Metric
    samples: Sequence[Any]
    key: str | None = None
    _stacked: dict[str, Tensor] = field(init=False, repr=False)  # states that are tensors, of shape (samples, …)

    def __post_init__(self) -> None:
        first = self.samples[0] if adds_up(self.metric) else {}
        names = [name for name, state in first.items() if isinstance(state, Tensor)]
        self._stacked = {name: torch.stack([sample[name] for sample in self.samples]) for name in names}

    def __len__(self) -> int:
        return len(self.samples)

    def results(self, choices: Sequence[Choice]) -> list[float]:
        """The metric's results on some choices of samples.

        Args:
            choices: The choices.

        Returns:
            One number for each choice.
        """
        if not adds_up(self.metric):
            return [self._by_inputs(chosen) for chosen in choices]
        entries = sum(states[0].numel() for states in self._stacked.values())
        size = max(1, _TOGETHER // max(len(self), entries))
        parts = [choices[start : start + size] for start in range(0, len(choices), size)]
        return [result for part in parts for result in self._by_states(part)]

    def _by_states(self, choices: Sequence[Choice]) -> list[float]:
        counts = torch.tensor(np.stack([np.bincount(chosen, minlength=len(self)) for chosen in choices]))
        sums = {name: _sums(counts, states) for name, states in self._stacked.items()}
        lists = [name for name in self.samples[0] if name not in sums]
        if lists or not sums:
            different = places = np.arange(len(choices))
        else:  # many choices have the same sums, as of an accuracy
            table = torch.cat([values.double().reshape(len(choices), -1) for values in sums.values()], dim=1)
            _, different, places = np.unique(table.numpy(), axis=0, return_index=True, return_inverse=True)
        results = []
        for number in different.tolist():
            for name, values in sums.items():
                setattr(self.metric, name, values[number])
            for name in lists:
                setattr(self.metric, name, [item for sample in choices[number] for item in self.samples[sample][name]])
            results.append(self._result())
        return [results[place] for place in places.reshape(-1).tolist()]

    def _by_inputs(self, chosen: Choice) -> float:
        self.metric.reset()
        calls = [self.samples[sample] for sample in chosen]
        args = [_joined([call[0][place] for call in calls]) for place in range(len(calls[0][0]))]
        self.metric.update(*args, **{name: _joined([call[1][name] for call in calls]) for name in calls[0][1]})
        return self._result()

    def _result(self) -> float:
        result = self.metric.compute()
        return float(result[self.key] if isinstance(result, Mapping) else result)


def _sums(counts: Tensor, states: Tensor) -> Tensor:
    """The sums over choices (R, …) of samples that each has counted, (R, S), of their states (S, …)."""
    summed = counts.double() @ states.double().reshape(len(states), -1)
    return summed.to(states.dtype).reshape(len(counts), *states.shape[1:])


class SampleRecorder:
    """Listens to a metric that is updated with batches, and keeps what it makes of each sample.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._copy = alone(metric)
        self._found: list[tuple[int, Any]] = []
        self._complete = True

    @contextmanager
    def listening(self, share: Share) -> Iterator[None]:
        """Records while the metric is updated with one batch.

        Args:
            share: The batch's samples, without those that do not count.
        """
        calls: list[Call] = []
        update, forward = self.metric.update, self.metric.forward
        within_forward = False  # it updates by itself, once or twice

        def heard_update(*args: Any, **kwargs: Any) -> None:
            if not within_forward:
                calls.append((args, kwargs))
            update(*args, **kwargs)

        def heard_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal within_forward
            calls.append((args, kwargs))
            within_forward = True
            try:
                return forward(*args, **kwargs)
            finally:
                within_forward = False

        own = vars(self.metric)  # torchmetrics itself puts `update` there
        own["update"], own["forward"] = heard_update, heard_forward
        try:
            yield
        finally:
            own["update"] = update
            del own["forward"]
        self._record(calls, share)

    def gathered(self, key: str | None = None) -> SampleStates | None:
        """What was recorded on all processes, which call this together; ``None`` if it was not sample by sample.

        Args:
            key: The result that counts, for a metric with several.
        """
        found, complete = [self._found], [self._complete]
        if dist.is_available() and dist.is_initialized():
            everything: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everything, (self._found, self._complete))
            found, complete = [rank[0] for rank in everything], [rank[1] for rank in everything]
        in_order = sorted((pair for rank in found for pair in rank), key=lambda pair: pair[0])
        if not all(complete) or not in_order:
            return None
        copy = self._copy.cpu()
        return SampleStates(copy, [sample for _, sample in in_order], key)

    def _record(self, calls: Sequence[Call], share: Share) -> None:
        samples = [sample for call in calls for sample in _each_sample(call)]
        if share.new is None or len(samples) != share.new:
            self._complete = False  # the metric gets something else than samples, tokens perhaps
            return
        first, step = share.places
        for number, (args, kwargs) in enumerate(samples):
            kept: Any = (args, kwargs)
            if adds_up(self._copy):
                self._copy.reset()
                self._copy.update(*args, **kwargs)
                kept = {name: _copied(value) for name, value in self._copy.metric_state.items()}
            self._found.append((first + number * step, apply_to_collection(kept, Tensor, lambda t: t.detach().cpu())))


def _copied(state: Any) -> Any:
    return list(state) if isinstance(state, list) else state.clone()


def _each_sample(call: Call) -> Iterator[Call]:
    args, kwargs = call
    sizes = {
        len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor | list) and _has_length(value)
    }
    if len(sizes) != 1:
        return
    for sample in range(sizes.pop()):
        yield (
            tuple(_one(value, sample) for value in args),
            {name: _one(value, sample) for name, value in kwargs.items()},
        )


def _has_length(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim > 0


def _one(value: Any, sample: int) -> Any:
    divided = isinstance(value, Tensor | list) and _has_length(value)
    return value[sample : sample + 1] if divided else value


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor) and values[0].ndim > 0:
        return torch.cat(list(values))
    return [item for value in values for item in value] if isinstance(values[0], list) else values[0]
