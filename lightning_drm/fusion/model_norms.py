"""How much all parameters of a model together were changed, before the merge and by it: what LiNeS weighs.

Each rank adds up the entries of its own parameters. The sums of all parameters meet in one table and are added at the
end, without rounding, so that the number of ranks changes no bit.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_drm.merging import Delta, TaskArithmetic
from lightning_drm.merging.linalg.selection import CHUNK, DEVICE_CHUNK, Reduce


def norms(deltas: Sequence[Delta], coefficients: Sequence[float], merged: Tensor) -> Tensor:
    r"""The norms of one parameter, or of a piece of it, before the merge and after it.

    Args:
        deltas: The tasks' deltas.
        coefficients: Their coefficients :math:`\lambda_t`.
        merged: The merged delta D.

    Returns:
        :math:`\|\sum_t \lambda_t D_t\|_1` and :math:`\|D\|_1`, of shape (2,), in float64 on the CPU.

    Example:
        >>> deltas = [torch.tensor([1.0, -3.0]), torch.tensor([1.0, 1.0])]
        >>> norms(deltas, [1.0, 1.0], merged=torch.tensor([1.0, -1.0]))
        tensor([4., 2.], dtype=torch.float64)
    """
    summed = TaskArithmetic(scale=1.0).merge(deltas, coefficients)
    return torch.stack([_size(summed), _size(merged)]).cpu()


def over_model(own: Mapping[str, Tensor], names: Collection[str], reduce: Reduce) -> tuple[float, float]:
    """The norms of all parameters together.

    Args:
        own: By name, the `norms` of the parameters that this rank merges.
        names: The names of all parameters, on all ranks.
        reduce: Sums a tensor over ranks, all of which make this call.
    """
    table = torch.zeros(len(names), 2, dtype=torch.float64)
    for row, name in enumerate(sorted(names)):
        if name in own:
            table[row] = own[name]
    summed, merged = reduce(table).T.tolist()
    return math.fsum(summed), math.fsum(merged)


def _size(tensor: Tensor) -> Tensor:
    """The sum of magnitudes, a slice at a time: a float64 copy of a whole parameter would take many times as long."""
    slices = torch.split(tensor.flatten(), CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK)
    return torch.stack([part.abs().sum(dtype=torch.float64) for part in slices]).sum()
