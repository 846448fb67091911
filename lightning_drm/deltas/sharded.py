"""Tensors that are spread over ranks (FSDP2's ``DTensor``): a rank's own piece, and the whole.

Deltas are differences, entry by entry, so a rank subtracts piece from piece; only what leaves a parameter's entries
apart, such as hashing, storing and merging, needs the whole of it, one parameter at a time.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it is sharded all ranks ask for it, for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_piece(held: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like another one, from what this rank holds of it.

    Args:
        held: This rank's piece, on any device.
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
