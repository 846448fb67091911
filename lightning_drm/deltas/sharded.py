"""Tensors that are spread over ranks (FSDP2's ``DTensor``): what a rank holds locally, and the whole.

Deltas are differences, entry by entry, so each rank subtracts what it holds; only work that needs all entries together,
such as hashing, storing and merging, gathers the whole of a tensor, one parameter at a time.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it is sharded all ranks ask for it, for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local(held: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like another one, from what this rank holds of it.

    Args:
        held: This rank's part, on any device.
        like: A tensor of the same shape, sharded or not.
    """
    if not isinstance(like, DTensor):
        return held
    return DTensor.from_local(
        held.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of which every rank has all, sharded like another one; no rank sends anything.

    Args:
        tensor: The whole tensor, on the device that `like` is on.
        like: A tensor of the same shape, sharded or not.
    """
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=like.placements
    )
