"""Taking statistics of a task's training data through a session: from a fit's own module, or a rebuilt one."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_drm.deltas import Collected
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.merging import Need
from lightning_drm.training.session import MergeSession
from lightning_drm.training.statistics import SampledLoader
from lightning_drm.training.training_batches import TrainingBatches, is_one_loader


def collect_statistics(
    session: MergeSession,
    module: nn.Module,
    task: str,
    loader: Callable[[], Any],
    needs: Sequence[Need],
    how: Collected,
    *,
    strategy: Strategy,
    data: LightningDataModule | None,
) -> None:
    """Collects statistics of a task's training data. All ranks call it together.

    Args:
        session: Where the task was collected.
        module: The task's module, trained, with whole weights, on the strategy's device.
        task: The task's name.
        loader: Makes or gives its training loader, the same on all ranks.
        needs: Which statistics.
        how: How they are collected.
        strategy: Tells the precision of the inputs, and the device.
        data: Its data module, if it has one.

    Raises:
        ValueError: If the training data are not one loader, or the module does not give what is asked.
    """
    for need in needs:
        batches = training_samples(loader, task, how.num_samples, session.ranks, strategy, data, module, need)
        session.collect_statistics(
            module, task, batches, [need], num_samples=how.num_samples, count_padding=how.count_padding
        )


def training_samples(
    loader: Callable[[], Any],
    task: str,
    num_samples: int,
    ranks: Ranks,
    strategy: Strategy,
    data: LightningDataModule | None,
    module: nn.Module | None = None,
    need: Need = "gram",
) -> TrainingBatches:
    """Batches of some of a task's training samples, always the same ones, on the strategy's device.

    Args:
        loader: Makes or gives the training loader, the same on all ranks.
        task: The task's name.
        num_samples: How many samples, over all ranks.
        ranks: The processes.
        strategy: Tells the precision of the inputs, and the device.
        data: The task's data module, if it has one.
        module: Its module, for batch hooks of its own.
        need: What they are for.
    """

    def sampled() -> SampledLoader:
        if not is_one_loader(found := loader()):
            raise ValueError(
                f"Statistics are taken from one training loader, and that of task {task!r} is a {type(found).__name__}."
            )
        return SampledLoader(found, num_samples, ranks, need)

    hooks = module if isinstance(module, LightningModule) else LightningModule()
    return TrainingBatches(sampled, strategy, data, hooks)
