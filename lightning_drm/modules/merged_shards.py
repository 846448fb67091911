"""Sharding a merged backbone: its blocks once for all tasks, each tensor in its place."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_drm.deltas.sharded import shard_like, whole
from lightning_drm.modules.sharding import shard_blocks


def take_up(modules: Sequence[nn.Module], backbone: Mapping[str, DTensor], placeholders: Mapping[str, Tensor]) -> None:
    """Shards the blocks of a backbone of placeholders, and puts each tensor in the place of its own.

    Args:
        modules: The tasks' modules around that backbone.
        backbone: By name, its tensors, sharded as they may be.
        placeholders: By name, what stands in the modules for them.
    """
    names = {id(placeholders[name]): name for name in backbone}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in backbone}
    for child in nn.ModuleList(modules).modules():
        for key, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in names:
                places[names[id(parameter)]].append((child, key))
    _part_placeholders(modules, set(names))
    mesh = next(iter(backbone.values())).device_mesh
    for module in modules:
        shard_blocks(module, mesh)
    for name, tensor in backbone.items():
        entire = whole(tensor)  # one at a time; the mesh may be divided in another way than it was for training
        unsharded = nn.Parameter(entire, requires_grad=False)  # one object, also where it is tied
        for child, key in places[name]:
            live = getattr(child, key)
            sharded = isinstance(live, DTensor)
            setattr(child, key, nn.Parameter(shard_like(entire, live), False) if sharded else unsharded)


def _part_placeholders(modules: Sequence[nn.Module], placeholders: Set[int]) -> None:
    """Gives layers that are a task's own, such as blocks with its batch norms, placeholders that are their own.

    A parameter can be sharded with one block only.
    """
    layers: set[int] = set()
    taken: set[int] = set()
    for module in modules:
        own = [child for child in module.modules() if id(child) not in layers]
        held = [(child, n, p) for child in own for n, p in child.named_parameters(recurse=False)]
        apart = {id(p): p for _, _, p in held if id(p) in placeholders & taken}
        new = {place: nn.Parameter(torch.empty_like(p), requires_grad=False) for place, p in apart.items()}
        for child, name, parameter in held:
            if id(parameter) in new:
                setattr(child, name, new[id(parameter)])
        layers |= {id(child) for child in own}
        taken |= {id(parameter) for _, _, parameter in held}
