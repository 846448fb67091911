"""The Lightning strategies under which deltas can be collected, and when each process has all weights."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_drm.deltas import Parameter, quantized_layers


def is_sharded_strategy(strategy: Strategy) -> bool:
    """Whether each process has a part of the weights while a task is trained."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def refuse_strategy(strategy: Strategy) -> None:
    """Refuses strategies, precisions, and settings of theirs, under which deltas cannot be taken or would be lost.

    Args:
        strategy: The Trainer's strategy.

    Raises:
        ValueError: If the strategy is not supported, or one of its settings.
    """
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        method = strategy.launcher._start_method
        raise ValueError(
            f"{name} starts its processes by {method}, which loses the callback's deltas when they end; "
            "use strategy 'ddp', which starts scripts."
        )
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or is_sharded_strategy(strategy)
    if not supported or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{name} is not supported by DRMMergeCallback; use a single device, 'ddp', FSDPStrategy or "
            "ModelParallelStrategy."
        )
    if isinstance(strategy.precision_plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        raise ValueError(
            f"{type(strategy.precision_plugin).__name__} replaces layers by quantized ones, which have no deltas: use "
            "a floating-point precision such as 'bf16-true' or '32-true'."
        )
    if isinstance(strategy, FSDPStrategy) and (problem := _problem_of_fsdp(strategy)):
        raise ValueError(f"{name} {problem}.")


def _problem_of_fsdp(strategy: FSDPStrategy) -> str | None:
    if not strategy.kwargs["use_orig_params"]:
        return (
            "has use_orig_params=False, which hides from optimizers which parameters are the head's; leave it at "
            "Lightning's default, True"
        )
    if strategy.cpu_offload is not None and strategy.cpu_offload.offload_params:
        return "has cpu_offload, under which no deltas are taken; leave it out"
    return None


def refuse_quantized(strategy: Strategy, module: nn.Module) -> None:
    """Refuses a quantized base under a strategy that shards, whose pieces of codes would be nobody's weights.

    Args:
        strategy: The Trainer's strategy, which shards.
        module: A task's module.

    Raises:
        ValueError: If some of its weights are quantized.
    """
    if quantized_layers(module):
        raise ValueError(
            f"{type(module).__name__} has quantized weights, which {type(strategy).__name__} would shard: use one "
            "device, or 'ddp'."
        )


def refuse_rounded_buffers(strategy: FSDPStrategy, parameters: Mapping[str, Parameter]) -> None:
    """Refuses mixed precision where FSDP1 would keep buffers in it, such as the running statistics of a batch norm.

    Args:
        strategy: The Trainer's strategy.
        parameters: The backbone's parameters, by name.

    Raises:
        ValueError: If there are buffers of another precision, naming them.
    """
    precision = strategy.mixed_precision_config.buffer_dtype if strategy.mixed_precision_config is not None else None
    if precision is None:
        return
    tensors = {name: parameter.tensor for name, parameter in parameters.items()}
    rounded = [n for n, t in tensors.items() if not isinstance(t, nn.Parameter) and t.dtype != precision]
    if rounded:
        raise ValueError(
            f"{type(strategy).__name__} would keep the buffers {', '.join(rounded)} in {precision}; give it a "
            "mixed_precision whose buffer_dtype is None."
        )


def convert_precision(strategy: Strategy, module: nn.Module) -> None:
    """Gives a module the precision in which the strategy trains it, as Lightning does when it sets the strategy up.

    Args:
        strategy: The Trainer's strategy, with its precision plugin.
        module: A module before its training; it is changed.
    """
    converted = strategy.precision_plugin.convert_module(module)
    assert converted is module, "plugins that replace modules are refused"


def whole_weights(strategy: Strategy) -> AbstractContextManager[None]:
    """While it lasts every rank has all weights that FSDP1 keeps flat; under other strategies they stay as they are.

    Args:
        strategy: The Trainer's strategy, whose model must not be changed meanwhile.
    """
    if not isinstance(strategy, FSDPStrategy):
        return nullcontext()
    model = cast(nn.Module, strategy.model)
    return cast(AbstractContextManager[None], FullyShardedDataParallel.summon_full_params(model, writeback=False))
