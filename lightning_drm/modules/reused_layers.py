"""Letting several copies of a backbone be one: the same layer objects, not only the same tensors.

FSDP shards layers, so a layer that exists once for each task would be sharded once for each task. Tensors alone are
enough wherever nothing is sharded; hence only layers that are certain to compute alike are made one.
"""

from types import FunctionType

from torch import Tensor, nn
from torchmetrics import Metric

_NOT_SETTINGS = {*vars(nn.Module()), "_is_hf_initialized"}  # tensors, layers, hooks


def reuse_layers(origin: nn.Module, other: nn.Module) -> None:
    """Puts layers of `origin` in the places of those of `other` that compute the same.

    Args:
        origin: The module whose layers stay.
        other: A module that already holds the same backbone tensors; it is changed.
    """
    for name, layer in other._modules.items():
        there = origin._modules.get(name)
        if layer is None or there is None or layer is there:
            continue
        if any(True for _ in _tensors(layer)) and _computes_alike(there, layer):
            setattr(other, name, there)
        elif not isinstance(other, nn.ModuleList):  # whose elements are sharded as wholes
            reuse_layers(there, layer)


def _computes_alike(layer: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same class, settings and tensors, and so have all layers in them."""
    if type(layer) is not type(other) or isinstance(layer, Metric) or not _equal(_settings(layer), _settings(other)):
        return False
    ours, theirs = dict(_own_tensors(layer)), dict(_own_tensors(other))
    if ours.keys() != theirs.keys() or not all(_is_same(tensor, theirs[name]) for name, tensor in ours.items()):
        return False
    children, others = layer._modules, other._modules
    return children.keys() == others.keys() and all(
        child is others[name]
        or (child is not None and (twin := others[name]) is not None and _computes_alike(child, twin))
        for name, child in children.items()
    )


def _settings(layer: nn.Module) -> dict[str, object]:
    """What decides how a layer computes. Configurations do not: they also hold the tasks' own label maps."""
    plain = (bool, int, float, str, tuple, list, dict, set, FunctionType, type(None))
    found = {name: value for name, value in vars(layer).items() if name not in _NOT_SETTINGS}
    return {name: value for name, value in found.items() if isinstance(value, plain)}


def _equal(settings: dict[str, object], others: dict[str, object]) -> bool:
    try:
        return bool(settings == others)
    except (RuntimeError, ValueError):  # tensors and arrays among them, which have no single answer
        return False


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Parameters must be one object. Buffers that checkpoints leave out (position tables, say) are each layer's own."""
    if tensor is other:
        return True
    is_parameter = isinstance(tensor, nn.Parameter) or isinstance(other, nn.Parameter)
    return not is_parameter and tensor.dtype == other.dtype and tensor.device == other.device and tensor.equal(other)


def _own_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]
