"""How much memory a merge takes at most beside what it is given and what it gives back, estimated from shapes alone.

Of a parameter that is merged as a whole, these are the deltas of all tasks and those of the next one, which are read
ahead, and the method's own: a copy of the deltas and some matrices of the parameter's shape, or, where that is more,
three square matrices of doubles. An eigensolver takes these: the matrix, which becomes the vectors, and its workspace.
Statistics of the tasks' data come on top, for a method that needs them.
"""

from collections.abc import Mapping, Set
from math import prod

import torch

from lightning_drm.fusion.pieces import largest_piece, pieces
from lightning_drm.fusion.recipe import Treatment
from lightning_drm.fusion.threads import num_threads

_RESULTS = 4  # matrices of the parameter's shape: what was merged, the weight in its precision, and their sum


def merging_bytes(
    treatments: Mapping[str, Treatment],
    shapes: Mapping[str, tuple[int, ...]],
    num_tasks: int,
    device: torch.device,
    *,
    ranks: Mapping[str, int] | None = None,
    in_pieces: Set[str] = frozenset(),
) -> int:
    """About how much memory it takes to merge the parameter that takes the most, in float32.

    Args:
        treatments: By name, what is done to each parameter.
        shapes: By name, its shape.
        num_tasks: Number of tasks N.
        device: Where it is computed.
        ranks: By name, the sum of the deltas' inner dimensions, where all of a parameter's deltas are low-rank.
        in_pieces: Names of the parameters that are merged a few rows at a time, in several threads.

    Example:
        >>> from lightning_drm.fusion.recipe import Recipe
        >>> treatment = Recipe().treatment("fc.weight", "matrix", ["a", "b"])
        >>> merging_bytes({"fc.weight": treatment}, {"fc.weight": (1000, 10)}, 2, torch.device("cpu"))
        400000
    """
    ranks = ranks or {}
    found = [0]
    for name, treatment in treatments.items():
        if name in in_pieces:
            found.append(_in_pieces(treatment, shapes[name], num_tasks, device))
        else:
            found.append(_whole(treatment, shapes[name], num_tasks, ranks.get(name)))
    return max(found)


def too_large_as_a_whole(
    treatments: Mapping[str, Treatment], shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> frozenset[str]:
    """Names of the parameters that an accelerator, whose memory is scarce, merges a few rows at a time: embeddings.

    Args:
        treatments: By name, what is done to each parameter.
        shapes: By name, its shape.
        device: Where it is computed. In host memory, all parameters are merged as a whole.
    """
    if device.type == "cpu":
        return frozenset()
    return frozenset(
        name
        for name, shape in shapes.items()
        if name in treatments and treatments[name].works_in_pieces and len(pieces(shape, device)) > 1
    )


def _whole(treatment: Treatment, shape: tuple[int, ...], num_tasks: int, rank: int | None) -> int:
    method = treatment.method
    stack = num_tasks * prod(shape)
    if rank is not None and method is not None and method.supports_low_rank:
        stack = rank * prod(shape[:-2]) * sum(shape[-2:])
    square = method.square_side(treatment.matrix_shapes(shape)[0], num_tasks, rank) if method is not None else 0
    copies = 4 * (stack + _RESULTS * prod(shape))
    return 4 * 2 * stack + max(copies, 3 * 8 * square**2) + _bytes_of_statistics(treatment, shape, num_tasks)


def _in_pieces(treatment: Treatment, shape: tuple[int, ...], num_tasks: int, device: torch.device) -> int:
    copies = 2 * num_tasks * prod(shape[1:]) if treatment.expert_by_expert else 0
    entries = largest_piece(shape, device)
    piece = (entries // max(1, prod(shape[1:])), *shape[1:])
    own = 4 * (entries * (num_tasks + 4) + copies) + _bytes_of_statistics(treatment, piece, num_tasks)
    return own * num_threads(device)


def _bytes_of_statistics(treatment: Treatment, shape: tuple[int, ...], num_tasks: int) -> int:
    """Of a piece of so many rows, or of all of a parameter. Inputs are taken to be the larger side of an expert."""
    if treatment.method is None or treatment.method.needs is None:
        return 0
    if treatment.method.needs == "fisher":
        return 4 * num_tasks * prod(shape)
    return 4 * num_tasks * (shape[0] * max(shape[1:]) ** 2 if treatment.expert_by_expert else shape[-1] ** 2)
