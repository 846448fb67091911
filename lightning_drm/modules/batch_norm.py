r"""The running statistics of a merged model's batch norms, estimated again on a task's own batches.

Merged weights have other activations than any finetune, so neither the base's statistics nor an average of the
finetunes' fit them; a merge of variances may even be negative. As in ``torch.optim.swa_utils.update_bn``, the
statistics of :math:`n` batches are their plain mean:

.. math:: \mu = \tfrac{1}{n} \sum_i \mu_i, \qquad \sigma^2 = \tfrac{1}{n} \sum_i \sigma_i^2,

with the mean :math:`\mu_i` and the unbiased variance :math:`\sigma_i^2` of each batch, on which the batch itself is
normalized. They are summed in float64, over all processes. Other layers, such as dropout, stay as they are in a test.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_drm.deltas import backbone_parameters
from lightning_drm.deltas.compiled import eagerly
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.modules.measurement import run_forward

_MEAN, _VARIANCE = ".running_mean", ".running_var"


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """A module's batch norms that keep running statistics, by plain name.

    Args:
        module: A task's module, its head included.
    """
    names = {id(parameter.tensor): name for name, parameter in backbone_parameters(module, ()).items()}
    layers = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    return {
        names[id(layer.running_mean)].removesuffix(_MEAN): layer for layer in layers if id(layer.running_mean) in names
    }


def plain_batch_norms(module: nn.Module) -> nn.Module:
    """A module whose `torch.nn.SyncBatchNorm` are plain ones, since a merged model is not trained.

    Args:
        module: The module, which is changed.
    """
    if any(isinstance(child, nn.SyncBatchNorm) for child in module.modules()):
        return TorchSyncBatchNorm().revert(module)
    return module


def set_statistics(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Gives a module's batch norms statistics in tensors of their own.

    Args:
        module: The module, which is changed.
        statistics: By name of the buffer.

    Raises:
        ValueError: If the module has no such buffers.
    """
    layers = batch_norms(module)
    known = {f"{name}{ending}": (layer, ending[1:]) for name, layer in layers.items() for ending in (_MEAN, _VARIANCE)}
    live = {name: getattr(layer, buffer) for name, (layer, buffer) in known.items()}
    if wrong := [name for name, t in statistics.items() if name not in live or live[name].shape != t.shape]:
        raise ValueError(f"{type(module).__name__} has no batch norm with {', '.join(wrong)} of that shape.")
    for name, tensor in statistics.items():
        layer, buffer = known[name]
        setattr(layer, buffer, tensor.detach().to(live[name], copy=True))


@torch.no_grad()
def estimated(
    module: nn.Module, layers: Mapping[str, _BatchNorm], batches: Iterable[Any], ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """Estimates statistics on batches. The module stays as it is; all ranks call it, each with batches of its own.

    Args:
        module: A task's module, on the batches' device.
        layers: Those of its batch norms whose statistics are wanted, by name.
        batches: The task's batches.
        ranks: The processes.

    Returns:
        By name of the buffer, a tensor ``(features,)`` in float64 on the CPU, the same on every rank; nothing of layers
        that no batch went through.

    Raises:
        ValueError: If there are no batches.
    """
    sums = {name: torch.zeros(2, layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
    counts = torch.zeros(len(layers) + 1, dtype=torch.float64)
    places = {layer: (name, place) for place, (name, layer) in enumerate(layers.items())}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer.training:  # else a module keeps it from that
            name, place = places[cast(_BatchNorm, layer)]
            of_batch = torch.stack([layer.get_buffer("running_mean"), layer.get_buffer("running_var")])
            sums[name] += of_batch.to("cpu", torch.float64)
            counts[place] += 1

    with _of_one_batch(module, places, note):
        for batch in batches:
            run_forward(module, batch)
            counts[-1] += 1
    ranks.sum(counts)
    if not counts[-1]:
        raise ValueError("There are no batches to estimate batch norm statistics on.")
    found: dict[str, Tensor] = {}
    for (name, total), count in zip(sums.items(), counts.tolist(), strict=False):
        ranks.sum(total)
        if count:
            found[name + _MEAN], found[name + _VARIANCE] = total / count
    return found


@contextmanager
def _of_one_batch(module: nn.Module, layers: Iterable[_BatchNorm], note: Callable[..., None]) -> Iterator[None]:
    """While it lasts, batch norms keep the statistics of the last batch, and all else is as in a test."""
    layers = list(layers)
    modes = {child: child.training for child in module.modules()}
    kept = [({n: b.clone() for n, b in layer.named_buffers(recurse=False)}, layer.momentum) for layer in layers]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    module.eval()
    try:
        for layer in layers:
            layer.train()
            layer.momentum = 1.0
            layer.reset_running_stats()  # NaN times 0 would be NaN
        with eagerly():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode
        for layer, hook, (buffers, momentum) in zip(layers, hooks, kept, strict=True):
            hook.remove()
            layer.momentum = momentum
            for name, values in buffers.items():
                layer.get_buffer(name).copy_(values)


@contextmanager
def by_batch_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """While it lasts, batch norms normalize each batch on itself, and their running statistics stay as they are.

    Args:
        layers: The batch norms.
    """
    kept = [(layer, layer.training, layer.momentum) for layer in layers]
    try:
        for layer, _, _ in kept:
            layer.training, layer.momentum = True, 0.0
        yield
    finally:
        for layer, training, momentum in kept:
            layer.training, layer.momentum = training, momentum


def of_all_tasks(statistics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of all tasks' batches together, each task counting alike.

    Args:
        statistics: By task, its statistics by name of the buffer.

    Returns:
        Mean and variance, which has the spread of the tasks' means in it, of the layers that all tasks have.
    """
    tasks = list(statistics.values())
    common = [name for name in tasks[0] if name.endswith(_MEAN) and all(name in task for task in tasks)]
    together: dict[str, Tensor] = {}
    for name in common:
        variance = name.removesuffix(_MEAN) + _VARIANCE
        means, variances = (torch.stack([task[key].double() for task in tasks]) for key in (name, variance))
        together[name] = means.mean(0)
        together[variance] = (variances + (means - means.mean(0)).square()).mean(0)
    return together
