"""The processes that work on one run: which of them this is, and meetings that survive long work.

When ranks share the work of a merge, they arrive at a meeting minutes apart if one had more to do or wrote a file. A
collective of the training's process group would then time out, because that time-out is there to find a training that
hangs. So meetings have a process group of their own: gloo, over the CPU, with a time-out of a week. A rank that waits
in a meeting still notices at once when another one dies, because the connection between them closes. Until the ranks
have connected there is nothing that could close, so for that they have minutes only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lightning_drm.distributed.interfaces import follow_nccl

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ASSEMBLY = timedelta(minutes=10)
"""For all ranks to start and connect."""

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
        """All ranks of the default process group, or this process alone if there is none.

        Raises:
            ValueError: If they do not find each other.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        rank, size = dist.get_rank(), dist.get_world_size()
        with assembling(rank, size):
            meeting = dist.new_group(backend="gloo", timeout=ASSEMBLY)
        dist.distributed_c10d._set_pg_timeout(_PATIENCE, meeting)
        return cls(rank, size, meeting)

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


@contextmanager
def assembling(rank: int, size: int) -> Iterator[None]:
    """While it lasts a process group of gloo is made, over NCCL's interface unless a user names another.

    Args:
        rank: The number of this process.
        size: The number of processes.

    Raises:
        ValueError: If the processes do not find each other, with the reason.
    """
    follow_nccl()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        where = " at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ) if "MASTER_ADDR" in os.environ else ""
        advice = " GLOO_SOCKET_IFNAME names the interface between the nodes." if "Gloo" in reason else ""
        raise ValueError(f"Rank {rank} of {size} did not find all others{where}: {reason}.{advice}") from error
