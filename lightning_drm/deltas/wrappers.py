"""The modules that are put around others, by FSDP1, activation checkpointing, `torch.compile` and peft.

FSDP1 lays the weights of a wrapped module end to end in one tensor, of which each rank has a piece. The parameters stay
in their places, as views of what this rank has of them: flat, and often empty.
"""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened

from lightning_drm.deltas.compiled import uncompiled
from lightning_drm.deltas.lora import strip_adapter


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside such wrappers, adapters aside; itself where there are none."""
    while True:
        module = uncompiled(module)
        if isinstance(module, FullyShardedDataParallel):
            module = module.module
        elif isinstance(module, CheckpointWrapper):
            module = module._checkpoint_wrapped_module
        else:
            return module


def plain(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, those of adapters included."""
    while (bare := strip_adapter(unwrapped(module))) is not module:
        module = bare
    return module


def remove_wrappers(module: nn.Module) -> nn.Module:
    """Takes adapters and all other wrappers out of a module in place, leaving the layers inside.

    Unlike peft's ``unload`` it needs no `PeftModel` around the module, so adapters that were injected go too.
    ``modules_to_save`` keep their finetuned copy, the one that is active.

    Args:
        module: Any module that FSDP1 has not taken over.

    Returns:
        The module, or what is inside where it is a wrapper itself. Its parameters have their plain names.
    """
    bare = plain(module)
    for name, child in list(bare.named_children()):
        if (inside := remove_wrappers(child)) is not child:
            setattr(bare, name, inside)
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    return bare


def is_flat(module: nn.Module) -> bool:
    """Whether FSDP1 has taken over some of a module's parameters, which it never gives back."""
    flattened = any(_is_fsdp_flattened(parameter) for parameter in module.parameters())
    return flattened or any(isinstance(child, FullyShardedDataParallel) for child in module.modules())


def refuse_apart(module: nn.Module) -> None:
    """Refuses a module with parameters that FSDP1 leaves to each process alone: there is no common value to collect.

    Args:
        module: The module as it is trained, its parts in FSDP1's care.

    Raises:
        ValueError: If gradients of parameters are not averaged over the ranks, naming them.
    """
    apart = [name for name, p in module.named_parameters() if p.requires_grad and not _is_fsdp_flattened(p)]
    if apart:
        raise ValueError(
            f"{type(module).__name__} has parameters that each process would train apart from the others, as they are "
            f"ignored or not wrapped: {', '.join(apart)}; leave all wrapping to FSDPStrategy."
        )


def refuse_flat(module: nn.Module) -> None:
    """Refuses a module that was fitted or tested under FSDP1 before.

    Args:
        module: The module, outside of FSDP1's care.

    Raises:
        ValueError: If this rank has only a piece of its weights.
    """
    if is_flat(module):
        raise ValueError(
            f"{type(module).__name__} was fitted or tested under FSDPStrategy before, which left each process a piece "
            "of its weights; take a fresh module, and test a merged one several times with strategy='ddp'."
        )


def refuse_divided(module: nn.Module) -> None:
    """Refuses a module with a layer in several places, of which FSDP1 has wrapped one: elsewhere it has no weights.

    Args:
        module: The module in FSDP1's care.

    Raises:
        ValueError: If there is such a layer, naming what is wrapped around it.
    """
    wrappers: dict[int, set[FullyShardedDataParallel | None]] = {}

    def walk(child: nn.Module, wrapper: FullyShardedDataParallel | None) -> None:
        wrapper = child if isinstance(child, FullyShardedDataParallel) else wrapper
        for parameter in child.parameters(recurse=False):
            wrappers.setdefault(id(parameter), set()).add(wrapper)
        for grandchild in child.children():
            walk(grandchild, wrapper)

    walk(module, None)
    divided = {type(w.module).__name__ for found in wrappers.values() if len(found) > 1 for w in found if w is not None}
    if divided:
        raise ValueError(
            f"FSDPStrategy has an auto_wrap_policy for {', '.join(sorted(divided))}, with weights that all tasks share "
            "but that it gathers for the first one only; wrap layers further inside, or test with strategy='ddp'."
        )
