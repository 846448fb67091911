"""What a plan costs: work, bytes read and written, and memory, estimated from headers alone."""

from math import prod

import torch

from lightning_drm.checkpoints.planning.plan import Plan
from lightning_drm.fusion import merging_bytes
from lightning_drm.fusion.share_out import costs

_AROUND = 32 << 20  # journals, index, tokenizer, configuration and card


def plan_costs(plan: Plan) -> dict[str, float]:
    """By name, what each tensor of a whole merged model costs, in the unit of `Method.cost`; merged ones come first."""
    treatments = {**plan.treatments, **dict.fromkeys(plan.kept)}
    shapes = {**plan.shapes, **{name: plan.headers[name].shape for name in plan.kept}}
    return costs(treatments, shapes, len(plan.tasks), _ranks(plan))


def read_bytes(plan: Plan) -> int:
    """How many bytes are read from all files."""
    total = 0
    for task in plan.tasks:
        for raw in task.raw_names():
            entry = task.input.entries[raw]
            numel = entry.rank * prod(entry.shape[:-2]) * sum(entry.shape[-2:]) if entry.rank else prod(entry.shape)
            total += numel * entry.dtype.itemsize
    return total + sum(prod(header.shape) * header.dtype.itemsize for header in plan.base.tensors.headers.values())


def written_bytes(plan: Plan) -> int:
    """How many bytes a whole merged model takes."""
    return sum(prod(header.shape) * header.dtype.itemsize for header in plan.headers.values())


def disk_bytes(plan: Plan) -> int:
    """How many bytes of disk a merge needs until it has ended: for tensors, heads, and the files that come and go."""
    heads = [task.input.entries[raw] for task in plan.tasks for raw in task.head]
    tensors = [tensor for task in plan.tasks for tensor in task.input.head.values()]
    total = sum(prod(entry.shape) * entry.dtype.itemsize for entry in heads) + sum(map(_size, tensors)) + _AROUND
    if plan.output_format == "full":
        return total + written_bytes(plan)
    for name in plan.kinds:
        ranks = [task.input.entries[task.names[name]].rank for task in plan.tasks if name in task.names]
        rank = sum(ranks) if plan.mismatch.rank is None else min(plan.mismatch.rank, sum(ranks))
        # Several processes write what each has merged before one writes the file.
        total += 2 * rank * sum(plan.shapes[name]) * torch.float32.itemsize
    return total


def _ranks(plan: Plan) -> dict[str, int]:
    """By name, the sum of the deltas' inner dimensions, of the parameters whose deltas are all low-rank."""
    ranks: dict[str, int] = {}
    for name in plan.kinds:
        entries = [task.input.entries[task.names[name]] for task in plan.tasks if name in task.names]
        if all(entry.rank for entry in entries):
            ranks[name] = sum(entry.rank for entry in entries)
    return ranks


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def memory_bytes(plan: Plan, device: torch.device) -> int:
    """About how much memory a merge needs beside the interpreter and its libraries: that of one parameter, mostly.

    Args:
        plan: The plan.
        device: Where it will be computed.
    """
    return merging_bytes(
        plan.treatments, plan.shapes, len(plan.tasks), device, ranks=_ranks(plan), in_pieces=plan.in_pieces
    )
