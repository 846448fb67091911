"""Where a merged model is built: where it is wanted, or in host memory if that device has no room for it.

When the last task has arrived, its module and its optimizer may still be on the device. A second model beside them may
be more than it holds.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import free_bytes


def home_of_merged(wanted: torch.device, base: Mapping[str, Tensor], merging: int, ranks: Ranks) -> torch.device:
    """The device on which a merged model is built; all ranks find the same.

    Args:
        wanted: The device where it should be.
        base: The base's tensors by name, which it will be as large as. Where they are sharded so is the merged model,
            and it stays on the wanted device.
        merging: How many bytes of that device the merge itself takes.
        ranks: The ranks.
    """
    if wanted.type == "cpu" or any(isinstance(tensor, DTensor) for tensor in base.values()):
        return wanted
    size = sum(tensor.nbytes for tensor in base.values())
    free = min(ranks.gather(free_bytes(wanted)))
    if size + merging <= free:
        return wanted
    if ranks.is_first:
        warnings.warn(
            f"The merged model is built in host memory: on {wanted}, {free / 1e9:.1f} GB are free, and it takes "
            f"{size / 1e9:.1f} GB beside the {merging / 1e9:.1f} GB of merging. Move it where you need it.",
            stacklevel=4,
        )
    return torch.device("cpu")
