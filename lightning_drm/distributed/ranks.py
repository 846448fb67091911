"""The processes that work on one run: which of them this is, and meetings that survive long work.

Merging shares work out, so ranks arrive minutes apart where one had more to do, or wrote a file. A collective of the
training's process group would then run into its time-out, which is there to find a training that hangs. Hence a group
of its own for meetings: gloo, over the CPU, with a time-out of a week. That a rank has died is noticed at once all the
same, as its connections close.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PATIENCE = timedelta(weeks=1)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; by default one that is alone, for which every method returns at once.

    All ranks call the methods, in the same order.

    Attributes:
        rank: Which one this process is.
        size: How many there are.
        meeting: The process group of meetings.

    Example:
        >>> alone = Ranks()
        >>> alone.is_first, alone.gather("x")
        (True, ['x'])
    """

    rank: int = 0
    size: int = 1
    meeting: ProcessGroup | None = None

    @classmethod
    def of_process_group(cls) -> Ranks:
        """All ranks of the default process group, or this process alone if there is none."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all ranks, however long they take."""
        if self.meeting is not None:
            dist.barrier(self.meeting)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a CPU tensor over all ranks, in place, waiting for all of them."""
        if self.meeting is not None:
            dist.all_reduce(tensor, group=self.meeting)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; waits for all of them."""
        values = [value] * self.size
        if self.meeting is not None:
            dist.all_gather_object(values, value, group=self.meeting)
        return values

    def copy_from(self, tensor: Tensor, source: int) -> Tensor:
        """Fills a tensor with what rank `source` has in its place, in place.

        A tensor on an accelerator goes over the training's process group, so the ranks must have met before.
        """
        if self.meeting is not None:
            dist.broadcast(tensor, source, group=self.meeting if tensor.device.type == "cpu" else None)
        return tensor


ALONE = Ranks()
"""A process that works by itself."""
