"""Where a task's deltas wait for the other tasks: on the device, in host memory, or on disk.

In memory, each rank keeps the deltas of the parameters it owns. Of the others a meta tensor is left, which has a shape
and a type but no values, so that every rank knows of every parameter. Only the rank that writes files has all deltas of
one task at once, in host memory, until they are written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_drm.deltas import StoredDeltas, TaskVector
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import bytes_beside_training
from lightning_drm.merging import Delta, LowRank
from lightning_drm.training.run_folder import RunFolder

Store = Literal["auto", "device", "cpu", "disk"]


class DeltaCache:
    """Takes in task vectors, and stores them if there is a run folder.

    Args:
        store: Where deltas wait. ``auto`` takes the disk if there is a run folder, else the device while it has room,
            else host memory: room that a training like the one before would not need at its peak.
        run_folder: Where they are stored, if they are.
        owners: Rank by parameter name.
        ranks: The ranks that take part.
    """

    def __init__(self, store: Store, run_folder: RunFolder | None, owners: Mapping[str, int], ranks: Ranks) -> None:
        self.store = store
        self.run_folder = run_folder
        self.owners = owners
        self.ranks = ranks
        self._on_disk = run_folder is not None and store in ("auto", "disk")
        self._writes = run_folder is not None and ranks.is_first
        self._num_bytes = 0  # of deltas that stay on the device because it has room

    def place(self, name: str, delta: Delta) -> Delta:
        """Moves a delta to where it waits, or to where it will be written from.

        Args:
            name: The parameter's name.
            delta: Its delta, on the device.
        """
        if self._on_disk or not self._is_own(name):
            return delta.to("cpu" if self._writes else "meta")
        if delta.device.type == "cpu" or self.store == "device":
            return delta
        size = sum(tensor.nbytes for tensor in _tensors(delta))
        if self.store == "cpu" or self._num_bytes + size > bytes_beside_training(delta.device):
            return delta.to("cpu")
        self._num_bytes += size
        return delta

    def take_in(self, vector: TaskVector) -> TaskVector:
        """Stores a task vector whose deltas have been placed; all ranks do so together.

        Args:
            vector: The task vector.

        Returns:
            What this rank keeps of it.

        Raises:
            FileNotFoundError: If this rank does not see what rank 0 wrote.
        """
        if self.run_folder is not None:
            if self._writes:
                self.run_folder.save_task_vector(vector)
            self.ranks.wait()
        if self._on_disk:
            return self._read_back(vector.task)
        deltas = {name: delta if self._is_own(name) else delta.to("meta") for name, delta in vector.deltas.items()}
        return dataclasses.replace(vector, deltas=deltas)

    def fetch(self, vector: TaskVector, name: str) -> Delta:
        """A delta on every rank, in host memory where its owner alone had it; all ranks ask for it together.

        Args:
            vector: What `take_in` returned, or a stored task vector.
            name: The parameter's name.
        """
        delta = vector.deltas[name]
        if self.ranks.size == 1 or isinstance(vector.deltas, StoredDeltas):
            return delta

        def copied(tensor: Tensor) -> Tensor:
            own = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu().contiguous()
            return self.ranks.copy_from(own, self.owners[name])

        return type(delta)(copied(delta.up), copied(delta.down)) if isinstance(delta, LowRank) else copied(delta)

    def _is_own(self, name: str) -> bool:
        return self.owners[name] == self.ranks.rank

    def _read_back(self, task: str) -> TaskVector:
        assert self.run_folder is not None
        try:
            return self.run_folder.load_task_vector(task)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Rank {self.ranks.rank} does not see the deltas of task {task!r} that rank 0 wrote: "
                f"{self.run_folder.path} must be on a file system that all nodes share."
            ) from error


def _tensors(delta: Delta) -> tuple[Tensor, ...]:
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta,)
