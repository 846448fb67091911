"""Where a delta waits until it is merged: on its device, in host memory, or on another rank.

A delta that another rank keeps leaves a meta tensor here: its shape and type, and no values. So every rank knows of
every parameter, though it holds only its share.
"""

from collections.abc import Callable

from torch import Tensor

from lightning_drm.merging import Delta, LowRank


def on_host(delta: Delta) -> Delta:
    """The delta in host memory."""
    return delta.to("cpu")


def without_values(delta: Delta) -> Delta:
    """What is left of a delta that another rank keeps."""
    return delta.to("meta")


def has_values(delta: Delta) -> bool:
    """Whether the delta is here."""
    return delta.device.type != "meta"


def num_bytes(delta: Delta) -> int:
    """What the delta takes in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(delta))


def tensors_of(delta: Delta) -> tuple[Tensor, ...]:
    """The tensors that a delta is made of."""
    return (delta.up, delta.down) if isinstance(delta, LowRank) else (delta,)


def with_tensors(delta: Delta, change: Callable[[Tensor], Tensor]) -> Delta:
    """The delta with each of its tensors replaced."""
    return LowRank(change(delta.up), change(delta.down)) if isinstance(delta, LowRank) else change(delta)
