"""A model out of the base, deltas, and the tasks' modules and heads; with statistics of batch norms that fit it."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drm.deltas import Base, TaskVector
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.merging import LowRank
from lightning_drm.modules import MultiTaskModule, batch_norms, head_names_of


def with_deltas(
    base: Base, module: nn.Module, head: Sequence[str] | None, deltas: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The base's tensors by name, on a module's device, some of them plus their delta.

    Args:
        base: The base.
        module: An untrained module of it.
        head: Names of its head; the module's own ``head_names`` if left out.
        deltas: Pairs of a parameter's name and its dense delta.
    """
    device = next(module.parameters()).device
    backbone = base.tensors(module, head_names_of(module, head))
    for name, delta in deltas:
        weight = backbone[name].to(device)
        backbone[name] = (weight.to(delta.dtype) + delta.to(device)).to(weight.dtype)
    return backbone


@dataclass(frozen=True)
class Assembled:
    """A model of several tasks.

    Attributes:
        module: The model.
        learned: By task that has some, the running means of batch norms that training has changed.
        statistics: By task whose batch norms were estimated again, their statistics by name.
    """

    module: MultiTaskModule
    learned: Mapping[str, Set[str]]
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def assemble(
    modules: Mapping[str, nn.Module],
    backbone: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    vectors: Mapping[str, TaskVector],
    *,
    factors: Mapping[str, LowRank] | None = None,
    head: Sequence[str] | None,
    batches: Mapping[str, Iterable[Any]] | None,
    max_batches: int,
    device: torch.device,
    ranks: Ranks,
) -> Assembled:
    """Puts a model together, and estimates its batch norms again where training has changed any.

    Args:
        modules: By task, its own module.
        backbone: The backbone's tensors by name, which all tasks share.
        heads: By task, its head's tensors by name.
        vectors: By task, its task vector, which tells what training has changed.
        factors: By name, low-rank deltas that are added to the backbone as an adapter.
        head: Names of the head; each module's own ``head_names`` if left out.
        batches: By task, batches of its training data; nothing is estimated if left out.
        max_batches: How many batches of each may be used; 0 for nothing to be estimated.
        device: Where to estimate.
        ranks: The processes, each with batches of its own.
    """
    module = MultiTaskModule.assemble(modules, backbone, heads, head=head, factors=factors)
    learned = _learned(module, vectors)
    if not learned or batches is None or not max_batches:
        return Assembled(module, learned)
    without = [task for task in module.task_names if task not in batches]
    if without and ranks.is_first:
        warnings.warn(
            f"No training data of {', '.join(without)} are at hand here, so their batch norms have statistics that "
            "were merged like all other buffers. Give fuse(batch_norm=…) batches of all tasks.",
            stacklevel=3,
        )
    wanted = {task: batches[task] for task in module.task_names if task in batches}
    statistics = module.to(device).estimate_batch_norm(wanted, max_batches=max_batches, layers=learned, ranks=ranks)
    again = MultiTaskModule.assemble(modules, backbone, heads, head=head, statistics=statistics, factors=factors)
    return Assembled(again, learned, statistics)


def _learned(merged: MultiTaskModule, vectors: Mapping[str, TaskVector]) -> dict[str, set[str]]:
    """By task that has some, the running means in its head, and those of the backbone that any task has changed."""
    shared = {name for vector in vectors.values() for name in vector.deltas}
    learned = {
        task: {f"{name}.running_mean" for name in batch_norms(merged.task_module(task))}
        & {*shared, *vectors[task].head}
        for task in merged.task_names
    }
    return {task: means for task, means in learned.items() if means}
