"""Copying a LightningModule without what it merely refers to."""

import copy
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import nn


def duplicate(module: LightningModule, replacements: dict[int, Any] | None = None) -> LightningModule:
    """A deep copy of a module, detached from its Trainer.

    Hyper-parameters and factories (of optimizers, say) that LightningCLI made refer to the CLI itself, and through it
    to every object of the run: they are shared, not copied.

    Args:
        module: The module.
        replacements: By ``id`` of an object inside the module, what the copy gets in its place.
    """
    memo = dict(replacements or {})
    for named in (vars(module), module.hparams, vars(module).get("_hparams_initial", {})):
        shared = [value for name, value in named.items() if isinstance(value, partial) or name == "_instantiator"]
        memo |= {id(value): value for value in shared}
    return copy.deepcopy(module, memo)


def without_weights(module: LightningModule) -> LightningModule:
    """A copy of a module that has its layers and buffers, but of its parameters only shapes and types.

    Args:
        module: The module, before it is sharded: afterwards PyTorch refuses to copy it.
    """
    return duplicate(
        module,
        {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()},
    )


def with_buffers_of(module: LightningModule, template: LightningModule) -> LightningModule:
    """What `without_weights` made of a module, with copies of the buffers as the module has them now.

    Args:
        module: The module, which may be sharded by now.
        template: The copy, which is changed.
    """
    for ours, theirs in zip(template.buffers(), module.buffers(), strict=True):
        ours.data = theirs.detach().clone()
    return template
