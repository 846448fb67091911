"""A task's own hooks, called from within the merged module as if the task were alone.

A hook counts where the task's module, or its data, define it themselves. What it logs goes to whoever called it, by the
name that was logged, without ``test_``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric, MetricCollection

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

Logged = dict[str, tuple[Any, dict[str, Any]]]
"""By name, what was logged, with its options."""

_LOG = signature(LightningModule.log)


def has_hook(hook: str, owner: object) -> bool:
    """Whether a module or a data module defines a hook itself.

    Args:
        hook: The hook's name.
        owner: The module; one that is not Lightning's has no hooks.
    """
    return isinstance(owner, LightningModule | LightningDataModule) and is_overridden(hook, owner)


def call_hook(module: nn.Module, hook: str, *args: Any) -> None:
    """Calls a hook of a test, where the module defines it.

    Args:
        module: A task's module.
        hook: The hook's name.
        args: Its arguments, without a ``dataloader_idx``.
    """
    if has_hook(hook, module):
        method = getattr(module, hook)
        takes_loader = "dataloader_idx" in signature(method).parameters
        method(*args, **({"dataloader_idx": 0} if takes_loader else {}))


def run_step(module: nn.Module, hook: str, batch: Any, batch_idx: int) -> Any:
    """Calls a module's ``training_step`` or ``test_step``, which takes the batch's number or not.

    Args:
        module: A task's module that has one.
        hook: The step's name.
        batch: The batch.
        batch_idx: Its number.
    """
    step: Callable[..., Any] = getattr(module, hook)
    parameters = list(signature(step).parameters.values())
    takes_number = len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return step(batch, batch_idx) if takes_number else step(batch)


def plain_name(name: str) -> str:
    """A logged name without ``test_``."""
    return name.removeprefix("test_").removeprefix("test/")


@contextmanager
def logs_of(module: nn.Module, trainer: Any, found: Logged) -> Iterator[None]:
    """Collects what a module logs while it runs inside another one.

    Args:
        module: A task's module.
        trainer: The Trainer that it has for so long.
        found: Where what it logs goes.
    """
    if not isinstance(module, LightningModule):
        yield
        return

    def log(*args: Any, **kwargs: Any) -> None:
        given = _LOG.bind(module, *args, **kwargs).arguments
        options = {key: given[key] for key in ("batch_size", "reduce_fx") if given.get(key) is not None}
        found[plain_name(given["name"])] = (given["value"], options)

    vars(module)["log"] = log
    before, module.trainer = module._trainer, trainer
    try:
        yield
    finally:
        del vars(module)["log"]
        module.trainer = before


@contextmanager
def metric_stand_ins(module: nn.Module) -> Iterator[dict[int, Metric]]:
    """Puts copies in the place of a module's metrics, which stay as they are.

    Args:
        module: A task's module.

    Yields:
        By ``id`` of a copy, the metric that it stands for.
    """
    originals: dict[int, Metric] = {}
    places = [
        (owner, name, child)
        for owner in module.modules()
        if not isinstance(owner, Metric | MetricCollection)
        for name, child in owner.named_children()
        if isinstance(child, Metric | MetricCollection)
    ]
    try:
        for owner, name, child in places:
            copy = child.clone()
            owner._modules[name] = copy
            originals |= {
                id(new): old
                for new, old in zip(copy.modules(), child.modules(), strict=True)
                if isinstance(old, Metric)
            }
        yield originals
    finally:
        for owner, name, child in places:
            owner._modules[name] = child
