"""How much memory is free: on a GPU, what its allocator has kept counts too.

PyTorch's allocator keeps memory that tensors have left, for those to come, so the driver calls it taken. After a
training that is most of a GPU, and `torch.cuda.mem_get_info` alone would find no room where there is plenty.
"""

from dataclasses import dataclass
from typing import Self

import psutil
import torch


@dataclass(frozen=True)
class DeviceMemory:
    """What a GPU's driver and this process's allocator say, in bytes.

    Attributes:
        free: What no process has.
        reserved: What this process's allocator has.
        allocated: What tensors take of it.
        peak: The most that tensors have taken of it so far.

    Example:
        >>> memory = DeviceMemory(free=10, reserved=60, allocated=25, peak=55)
        >>> memory.available, memory.beside_training
        (45, 15)
    """

    free: int
    reserved: int
    allocated: int
    peak: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """That of a CUDA device, now."""
        return cls(
            free=int(torch.cuda.mem_get_info(device)[0]),
            reserved=torch.cuda.memory_reserved(device),
            allocated=torch.cuda.memory_allocated(device),
            peak=torch.cuda.max_memory_allocated(device),
        )

    @property
    def available(self) -> int:
        """What tensors could take now."""
        return self.free + self.reserved - self.allocated

    @property
    def beside_training(self) -> int:
        """What could be taken for good, so that a training like the one before still has what it took at its peak."""
        return max(0, self.free + self.reserved - self.peak)


def free_bytes(device: torch.device) -> int:
    """The memory of a device that tensors could take now."""
    if device.type == "cuda":
        return DeviceMemory.of(device).available
    return int(psutil.virtual_memory().available)


def bytes_beside_training(device: torch.device) -> int:
    """The memory of a device that may be taken for good, while trainings like the one before are still to come."""
    if device.type == "cuda":
        return DeviceMemory.of(device).beside_training
    return free_bytes(device)
