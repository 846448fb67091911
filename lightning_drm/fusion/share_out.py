"""Which rank merges which parameter: the costliest ones are given out first, each to the rank with the least to do.

Longest-processing-time-first (Graham 1969) stays within 4/3 of the best possible largest share, and comes much closer
where no single parameter is large beside a rank's share. It looks at names, shapes and the recipe only: not at files,
tensors or processes, so every rank finds the same shares by itself, whatever the order of tasks and parameters is.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lightning_drm.fusion.recipe import Treatment
from lightning_drm.merging.method import COST_PER_VALUE


def costs(
    treatments: Mapping[str, Treatment | None],
    shapes: Mapping[str, tuple[int, ...]],
    num_tasks: int,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Estimates what each parameter costs to merge, in the unit of `Method.cost`.

    Args:
        treatments: By name, what is done to each parameter; ``None`` for one that is only copied.
        shapes: By name, its shape.
        num_tasks: Number of tasks N.
        ranks: By name, the sum of the deltas' inner dimensions, where all of a parameter's deltas are low-rank; of
            experts, for one of them.

    Returns:
        By name, the cost.

    Example:
        >>> from lightning_drm.fusion.recipe import Recipe
        >>> treatment = Recipe().treatment("fc.weight", "matrix", ["a", "b"])
        >>> found = costs({"fc.weight": treatment, "table": None}, {"fc.weight": (8, 8), "table": (8, 8)}, num_tasks=2)
        >>> found["fc.weight"] > found["table"] > 0
        True
    """
    ranks = ranks or {}
    return {name: _cost(treatment, shapes[name], num_tasks, ranks.get(name)) for name, treatment in treatments.items()}


def _cost(treatment: Treatment | None, shape: tuple[int, ...], num_tasks: int, rank: int | None) -> float:
    if treatment is None or treatment.method is None:
        return COST_PER_VALUE * prod(shape)
    return sum(treatment.method.cost(part, num_tasks, rank) for part in treatment.matrix_shapes(shape))


def share_out(costs: Mapping[str, float], num_ranks: int) -> list[list[str]]:
    """Gives every parameter to one rank.

    Args:
        costs: By name, the cost of each parameter.
        num_ranks: How many ranks there are.

    Returns:
        For each rank its share: the names of its parameters, in the order of `costs`. Every name is in one share.

    Example:
        >>> share_out({"a": 1.0, "b": 3.0, "c": 2.0}, num_ranks=2)
        [['b'], ['a', 'c']]
    """
    loads = [(0.0, rank) for rank in range(num_ranks)]
    owner: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, rank = loads[0]
        owner[name] = rank
        heapq.heapreplace(loads, (load + costs[name], rank))
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    for name in costs:
        shares[owner[name]].append(name)
    return shares


@dataclass(frozen=True)
class Balance:
    """How even the shares are.

    Attributes:
        largest: Cost of the largest share over the mean: 1.0 is perfect.
        possible: A lower bound of ``largest`` for whole parameters: of the k R + 1 costliest ones, one of R ranks has
            at least k + 1.
    """

    largest: float
    possible: float


def balance(costs: Mapping[str, float], num_ranks: int) -> Balance:
    """How evenly `share_out` shares some parameters out.

    Args:
        costs: By name, the cost of each parameter.
        num_ranks: How many ranks there are.
    """
    mean = sum(costs.values()) / num_ranks
    if not mean:
        return Balance(1.0, 1.0)
    largest = max(sum(costs[name] for name in share) for share in share_out(costs, num_ranks))
    descending = sorted(costs.values(), reverse=True)
    crowded = max((k + 1) * cost for k, cost in enumerate(descending[::num_ranks]))
    return Balance(largest / mean, max(1.0, crowded / mean))
