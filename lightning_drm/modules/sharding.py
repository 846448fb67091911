"""Sharding modules over the ranks of a data-parallel mesh, with FSDP2's ``fully_shard``.

The unit is a block: an element of a `torch.nn.ModuleList`, which is how layers that repeat are written. One block at a
time is whole while it computes.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The data-parallel part of the mesh that Lightning's `ModelParallelStrategy` makes.

    Args:
        mesh: The mesh, with dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: If there is tensor parallelism in it.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}, but weights are only "
            f"sharded over data: give it tensor_parallel_size: 1 and data_parallel_size: {mesh.size()}."
        )
    return mesh["data_parallel"]


def is_sharded(module: nn.Module) -> bool:
    """Whether some part of a module is sharded by ``fully_shard``."""
    return any(isinstance(child, FSDPModule) for child in module.modules())


def shard_blocks(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a module's blocks, unless they are; what is outside of them stays whole on every rank.

    Args:
        module: The module, with all its weights on every rank, or on no device (meta).
        mesh: The ranks.
    """
    for block in _blocks(module):
        if not isinstance(block, FSDPModule):
            # Each is a root of its own, and roots would stay whole after their first use.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def shard_for_training(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a module and its blocks, gradients and optimizer states following.

    Args:
        module: The module whose ``forward`` computes, with all its weights on every rank.
        mesh: The ranks.
    """
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)
