"""FSDP1 on the CPU: torch can do it, but Lightning has a GPU's index in mind and refuses its own class there."""

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class FSDPOnCPU(FSDPStrategy):
    """Wraps the module for the device ``cpu``, which has no index, and is the same otherwise."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
            return super()._setup_model(model)
        wrapped = FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        return super()._setup_model(wrapped)  # the rest, such as activation checkpointing
