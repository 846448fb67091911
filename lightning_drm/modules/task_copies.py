"""A task's own module around the backbone that all tasks share."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_drm.deltas import backbone_parameters, head_state, remove_wrappers
from lightning_drm.modules.batch_norm import plain_batch_norms
from lightning_drm.modules.duplicate import duplicate


def as_parameter(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as what it takes the place of: a parameter, or a buffer."""
    if isinstance(like, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def copy_with(
    module: nn.Module, head: Sequence[str], backbone: Mapping[str, Tensor], head_tensors: Mapping[str, Tensor] | None
) -> nn.Module:
    """A copy of a module, without adapters and other wrappers, whose tensors are replaced as they are copied.

    Args:
        module: The module.
        head: Names of its head.
        backbone: Its backbone's tensors.
        head_tensors: Its head's tensors, which are copied and may have other shapes; its own if left out.

    Raises:
        ValueError: If the module has another backbone, or the head other tensors.
    """
    backbone_live = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
    head_live = head_state(module, head)
    head_tensors = head_live if head_tensors is None else head_tensors
    if difference := sorted(backbone_live.keys() ^ backbone.keys()):
        raise ValueError(f"{type(module).__name__} has another backbone than the first task: {', '.join(difference)}.")
    if head_live.keys() != head_tensors.keys():
        raise ValueError(f"A head has the tensors {sorted(head_tensors)}, the module's head {sorted(head_live)}.")
    # Replaced while copying, so that the backbone is never in memory twice.
    memo: dict[int, Any] = {id(live): backbone[name] for name, live in backbone_live.items()}
    memo |= {id(live): as_parameter(head_tensors[name].detach().clone(), live) for name, live in head_live.items()}
    copied = plain_batch_norms(remove_wrappers(duplicate(module, memo)))
    for child in copied.modules():
        if isinstance(child, nn.Linear):  # where one module serves tasks whose heads have other numbers of classes
            child.out_features = child.weight.shape[0]
    return copied
