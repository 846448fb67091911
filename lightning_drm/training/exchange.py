"""Merging one model on several ranks: each parameter is merged by the rank that owns it, and its weight goes to all.

Three steps, so that no rank sits in a collective while another computes:

1. gather: every owner gets the base of its parameters, one parameter at a time;
2. merge: each rank merges its own parameters, for minutes, and hears nothing of the others;
3. exchange: once all ranks have met, each weight goes from its owner to all, who take what they need of it.

A rank holds N deltas and one base of its own share, and one foreign parameter at a time. What a parameter becomes
depends on its deltas and base alone, so the number of ranks changes no bit where each has as many threads. For methods
that must see the whole model first (TIES' threshold), each rank counts on its share, and integer counts are summed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_drm.deltas import Parameter
from lightning_drm.deltas.sharded import whole
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion.fuse import Fusion, Merged
from lightning_drm.fusion.recipe import Recipe
from lightning_drm.fusion.share_out import costs, share_out
from lightning_drm.merging import LowRank


class Owners(Mapping[str, int]):
    """Which rank owns which parameter.

    Tasks may train different parameters and come one after another, so owners are found as parameters become known: new
    ones are shared out among themselves, and none ever changes hands.

    Args:
        recipe: How they will be merged, which decides what they cost.
        tasks: All tasks.

    Attributes:
        low_rank: By name, the sum of all tasks' ranks, of the parameters with an adapter.
    """

    def __init__(self, recipe: Recipe, tasks: Sequence[str]) -> None:
        self._recipe = recipe
        self._tasks = tasks
        self._owner: dict[str, int] = {}
        self.low_rank: dict[str, int] = {}

    def share_out(self, parameters: Mapping[str, Parameter], num_ranks: int) -> None:
        """Finds an owner for every parameter that has none.

        Args:
            parameters: The parameters, by name.
            num_ranks: How many ranks there are.
        """
        new = {name: parameter for name, parameter in parameters.items() if name not in self._owner}
        treatments = {name: self._recipe.treatment(name, p.kind, self._tasks) for name, p in new.items()}
        shapes = {name: tuple(p.shape) for name, p in new.items()}
        ranks = {name: p.adapter_rank for name, p in new.items()}
        self.low_rank |= {name: rank * len(self._tasks) for name, rank in ranks.items() if rank is not None}
        shares = share_out(costs(treatments, shapes, len(self._tasks), self.low_rank), num_ranks)
        self._owner |= {name: rank for rank, names in enumerate(shares) for name in names}

    def __getitem__(self, name: str) -> int:
        return self._owner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def merge_together(
    fusion: Fusion,
    base: Mapping[str, Tensor],
    owners: Mapping[str, int],
    ranks: Ranks,
    home: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merges all parameters of a fusion; all ranks call it.

    Args:
        fusion: What to merge, with this rank's share of the names.
        base: The base's tensors by name, whole or sharded.
        owners: Rank by name.
        ranks: The ranks.
        home: Where merged weights wait for the others: where they will stay.
        progress: Called with the number of this rank's parameters that are merged, and of those that will be.

    Yields:
        Name and weight of every tensor of the base, whole and in the base's precision, the same on every rank: merged
        ones at home, or among several ranks on the fusion's device, the others as they are in the base.
    """
    own: dict[str, Tensor] = {}
    for name in fusion.kinds:
        weight = whole(base[name])
        if owners[name] == ranks.rank:
            own[name] = weight
    for num_done, (name, weight) in enumerate(_merged(fusion, own, home), start=1):
        own[name] = weight
        if progress is not None:
            progress(num_done, len(own))
    ranks.wait()
    place = fusion.device if ranks.size > 1 else home  # where training's own process group sends
    for name, tensor in base.items():
        if name not in fusion.kinds:
            yield name, whole(tensor)
        elif name in own:
            yield name, ranks.copy_from(own.pop(name).to(place).contiguous(), ranks.rank)
        else:
            weight = torch.empty(tensor.shape, dtype=tensor.dtype, device=fusion.device)
            yield name, ranks.copy_from(weight, owners[name])


def _merged(fusion: Fusion, base: Mapping[str, Tensor], home: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and merged weight of each parameter, at home: those that are merged as a whole, then those in pieces."""
    for merged in fusion.merge([name for name in base if not fusion.comes_in_pieces(name)]):
        yield merged.name, _added(base[merged.name], merged).to(home)
        del merged  # before the next one comes
    for name in base:
        if fusion.comes_in_pieces(name):
            weight = torch.empty_like(base[name], device=home)
            for merged in fusion.merge_in_pieces(name):
                rows = ... if merged.rows is None else merged.rows
                weight[rows] = _added(base[name][rows], merged).to(home)
            yield name, weight


def _added(weight: Tensor, merged: Merged) -> Tensor:
    """A weight, or the same rows of it, plus its merged delta, in the weight's precision and on the delta's device."""
    return (weight.to(merged.delta.device).to(merged.delta.dtype) + merged.delta).to(weight.dtype)


def merge_factors_together(
    fusion: Fusion,
    owners: Mapping[str, int],
    ranks: Ranks,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LowRank]:
    """Merges all parameters of a fusion whose deltas are low-rank; all ranks call it.

    Args:
        fusion: What to merge, with this rank's share of the names.
        owners: Rank by name.
        ranks: The ranks.
        device: Where the factors are wanted.
        progress: As for `merge_together`.

    Returns:
        By name, the merged factors, the same on every rank; nothing of parameters that keep the base's value.
    """
    names = [name for name in fusion.kinds if fusion.treatments[name].method is not None]
    own = [name for name in names if owners[name] == ranks.rank]
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for num_done, (name, factors, _) in enumerate(fusion.merge_low_rank(own), start=1):
        merged[name] = factors.up.contiguous().cpu(), factors.down.contiguous().cpu()
        if progress is not None:
            progress(num_done, len(own))
    found = {name: pair for of_rank in ranks.gather(merged) for name, pair in of_rank.items()}
    return {name: LowRank(*found[name]).to(device) for name in names}
