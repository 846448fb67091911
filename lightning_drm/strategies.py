"""Which of Lightning's strategies deltas can be collected under."""

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def refuse_strategy(strategy: Strategy) -> None:
    """Refuses, by name, strategies under which no process holds the whole weights or the callback's state is lost.

    Args:
        strategy: The Trainer's strategy.

    Raises:
        ValueError: If the strategy is not supported.
    """
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        method = strategy.launcher._start_method
        raise ValueError(
            f"{name} starts its processes by {method}, which loses the callback's deltas when they end; "
            "use strategy 'ddp', which starts scripts."
        )
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"{name} (FSDP1) keeps a layer's weights in one flat tensor, of which DRMMergeCallback takes no deltas; "
            "use ModelParallelStrategy (FSDP2), as in configs/strategy/fsdp2.yaml."
        )
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not supported or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{name} is not supported by DRMMergeCallback; use a single device, 'ddp' or ModelParallelStrategy."
        )
