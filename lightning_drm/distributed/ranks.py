"""The processes that work on one run: which of them this is, and meetings that survive long work.

When ranks share the work of a merge, they arrive at a meeting minutes apart if one had more to do or wrote a file. A
collective of the training's process group would then time out, because that time-out is there to find a training that
hangs. So meetings have a process group of their own: gloo, over the CPU, with a time-out of a week. A rank that waits
in a meeting still notices at once when another one dies, because the connection between them closes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ASSEMBLY = timedelta(minutes=10)  # for all ranks to connect: one that dies before it has connected closes nothing
_PATIENCE = timedelta(weeks=1)  # between two ranks' arrivals at a meeting


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; by default a single one, for which every method returns at once.

    All ranks call the same methods in the same order.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        meeting: The process group of the meetings.

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
        meeting = dist.new_group(backend="gloo", timeout=_ASSEMBLY)
        dist.distributed_c10d._set_pg_timeout(_PATIENCE, meeting)
        return cls(dist.get_rank(), dist.get_world_size(), meeting)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints what is written and printed once."""
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
        """Fills a tensor, in place, with the values that it has on rank `source`.

        A tensor on an accelerator is sent through the training's process group, so the ranks must have met just before.
        """
        if self.meeting is not None:
            dist.broadcast(tensor, source, group=self.meeting if tensor.device.type == "cpu" else None)
        return tensor


ALONE = Ranks()
"""A process that works by itself."""
