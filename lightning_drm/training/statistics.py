"""Statistics of the tasks' training data in a run: which are collected, and from which samples."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from torch import nn
from torch.utils.data import DataLoader

from lightning_drm.data import has_rows, num_rows, some_rows
from lightning_drm.deltas import Collected, TaskStatistics, TaskVector
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.fusion import free_bytes
from lightning_drm.merging import Method, Need
from lightning_drm.modules import fisher_information, gram_matrices

_MEMORY = 0.5  # of what is free, for the sums of one pass


@dataclass(frozen=True)
class StatisticsPlan:
    """Which statistics are collected, and how.

    Attributes:
        statistics: Those that were asked for; what the method needs comes on top.
        num_samples: From how many training samples of each task; the method's own number, or 256, if left out.
        count_padding: Whether the positions of padding count in Gram matrices.

    Raises:
        ValueError: If a setting is out of range; lists all that are.
    """

    statistics: Sequence[Need] = ()
    num_samples: int | None = None
    count_padding: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"statistics must be of {', '.join(get_args(Need))}, got {one!r}"
            for one in self.statistics
            if one not in get_args(Need)
        ]
        if self.num_samples is not None and self.num_samples < 1:
            problems.append(f"statistics_samples must be 1 or more, got {self.num_samples}")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")

    def of(self, method: Method) -> tuple[list[Need], Collected]:
        """Which statistics are to be there for a method, and how they are collected.

        Args:
            method: The method that merges.

        Raises:
            ValueError: If the method asks for another number of samples.
        """
        if self.num_samples is not None and method.num_samples not in (None, self.num_samples):
            raise ValueError(
                f"statistics_samples is {self.num_samples}, but {type(method).__name__} asks for statistics of "
                f"{method.num_samples} samples (num_samples): say one of them."
            )
        own = [method.needs] if method.needs is not None and not method.propagate else []  # or the merge takes them
        needs = list(dict.fromkeys([*self.statistics, *own]))
        return needs, Collected(self.num_samples or method.num_samples or Collected().num_samples, self.count_padding)


def missing(vector: TaskVector, needs: Sequence[Need], how: Collected) -> list[Need]:
    """Those of the statistics that a task does not have, or that were collected in another way."""
    found = vector.statistics.collected if vector.statistics is not None else {}
    return [need for need in needs if found.get(need) != how]


def taken(
    need: Need,
    module: nn.Module,
    head: Sequence[str],
    names: Set[str],
    batches: Iterable[Any],
    how: Collected,
    ranks: Ranks,
) -> TaskStatistics:
    """Statistics of one kind.

    Args:
        need: Which.
        module: The task's module, trained.
        head: Names of its head.
        names: The parameters that have a delta.
        batches: This rank's batches, on the module's device.
        how: How they are collected.
        ranks: The processes.
    """
    if need == "fisher":
        fisher, norm = fisher_information(module, head, names, batches, ranks=ranks)
        keys = {name: f"fisher::{name}" for name in fisher}
        return TaskStatistics({keys[n]: tensor for n, tensor in fisher.items()}, {need: keys}, {need: how}, norm)
    room = int(_MEMORY * free_bytes(next(module.parameters()).device))
    matrices, leaders = gram_matrices(
        module, head, names, batches, count_padding=how.count_padding, max_bytes=room, ranks=ranks
    )
    tensors = {f"gram::{name}": matrix for name, matrix in matrices.items()}
    return TaskStatistics(tensors, {need: {name: f"gram::{leader}" for name, leader in leaders.items()}}, {need: how})


def extended(
    vector: TaskVector,
    module: nn.Module,
    head: Sequence[str],
    batches: Iterable[Any],
    needs: Sequence[Need],
    how: Collected,
    ranks: Ranks,
) -> TaskStatistics:
    """The statistics that a task has, and others beside or in place of them.

    Args:
        vector: The task's vector.
        module: Its module, trained.
        head: Names of its head.
        batches: Of a ``DataLoader``, samples are chosen; of anything else all are taken, on the module's device.
        needs: Which are taken.
        how: How.
        ranks: The processes.
    """
    found = vector.statistics or TaskStatistics({}, {}, {})
    device = next(module.parameters()).device
    for need in needs:
        own = batches
        if isinstance(batches, DataLoader):
            own = OnDevice(SampledLoader(batches, how.num_samples, ranks, need), device)
        found = found.together_with(taken(need, module, head, set(vector.deltas), own, how, ranks))
    return found


class SampledLoader:
    """Batches of some training samples, chosen once; each rank has its share of them.

    Samples that have numbers are drawn at random, always the same ones. Of a stream, the first batches are taken whole
    until there are enough samples.

    Args:
        loader: A task's training loader.
        num_samples: How many samples, over all ranks.
        ranks: The processes, all of which give the same loader.
        need: What they are for. Fisher information is taken of one sample at a time.
    """

    def __init__(self, loader: Any, num_samples: int, ranks: Ranks, need: Need = "gram") -> None:
        self._loader = loader
        self._num_samples = num_samples
        self._ranks = ranks
        if has_rows(loader):
            order = torch.randperm(num_rows(loader), generator=torch.Generator().manual_seed(0))
            own = order[:num_samples][ranks.rank :: ranks.size].numpy()
            self._loader = some_rows(loader, own, 1 if need == "fisher" else loader.batch_size or 1)
            self._num_samples = len(own)
            self._ranks = ALONE

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for number, batch in enumerate(self._loader):
            if seen >= self._num_samples:
                return
            seen += extract_batch_size(batch)
            if number % self._ranks.size == self._ranks.rank:
                yield batch


class OnDevice:
    """Batches that are moved to a device one after another.

    Args:
        batches: The batches.
        device: Where to.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches = batches
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        return (move_data_to_device(batch, self._device) for batch in self._batches)
