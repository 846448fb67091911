"""Copying a task's module without what it merely refers to."""

import copy
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, Self, TypeVar

import torch
from torch import nn

from lightning_drm.deltas import quantized_layers
from lightning_drm.deltas.compiled import compiled_methods, is_compiled
from lightning_drm.deltas.quantized import is_quantized, twin

M = TypeVar("M", bound=nn.Module)


class _SharedFactory(partial[Any]):
    """A factory that is its own copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def duplicate(module: M, replacements: Mapping[int, Any] | None = None) -> M:
    """A deep copy of a module, detached from its Trainer where it has one.

    Hyper-parameters and factories (of optimizers, say) that LightningCLI made refer to the CLI itself, and through it
    to every object of the run: they are shared, not copied.

    Quantized weights, which never change, are shared, too.

    Parts that `torch.compile` was given stay compiled. Compiled methods would compute with the module that they came
    from, so the copy has the methods as they were written, also where the Trainer has compiled them.

    Args:
        module: The module.
        replacements: By ``id`` of an object inside the module, what the copy gets in its place.
    """
    memo = dict(replacements or {})
    for named in (vars(module), getattr(module, "hparams", {}), vars(module).get("_hparams_initial", {})):
        shared = [value for name, value in named.items() if isinstance(value, partial) or name == "_instantiator"]
        memo |= {id(value): value for value in shared}
    memo |= {id(child): twin(child) for child in module.modules() if is_quantized(child) and id(child) not in memo}
    memo |= {id(child.dynamo_ctx): child.dynamo_ctx for child in module.modules() if is_compiled(child)}
    if (of_trainer := vars(module).get("_compiler_ctx")) is not None:  # Lightning's, for a module that came compiled
        memo[id(of_trainer)] = None
    copied = copy.deepcopy(module, memo)
    for child in (child for child in module.modules() if id(child) in memo):
        for name, method in compiled_methods(child).items():
            owner = memo.get(id(method.__self__), method.__self__)
            vars(memo[id(child)])[name] = MethodType(method.__func__, owner)
    return copied


def share_factories(module: nn.Module) -> None:
    """Lets copies that others make of a module share its factories, too: Lightning's averaging callbacks make one.

    Args:
        module: The module, which is changed.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, partial):
            setattr(module, name, _SharedFactory(value.func, *value.args, **value.keywords))


def without_weights(module: M, quantized: Mapping[str, nn.Module] | None = None) -> M:
    """A copy of a module that has its layers and buffers, but of its parameters only shapes and types.

    Quantized layers stay whole, as their weights are never in memory twice.

    Args:
        module: The module, before it is sharded: afterwards PyTorch refuses to copy it.
        quantized: By the weight's name, quantized layers of the same base to share in place of the module's own.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    shared = quantized or {}
    memo |= {id(layer): twin(shared[name]) for name, layer in quantized_layers(module).items() if name in shared}
    return duplicate(module, memo)


def with_buffers_of(module: nn.Module, template: M) -> M:
    """What `without_weights` made of a module, with copies of the buffers as the module has them now.

    Args:
        module: The module, which may be sharded by now.
        template: The copy, which is changed.
    """
    for ours, theirs in zip(template.buffers(), module.buffers(), strict=True):
        ours.data = theirs.detach().clone()
    return template
