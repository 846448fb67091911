"""A task's training batches outside of its fit, for the batch norms of the merged model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader


def is_one_loader(loader: Any) -> bool:
    """Whether training data come from one loader: of several, it is not known what a batch of the task is."""
    return loader is not None and not isinstance(loader, Sequence | Mapping | CombinedLoader)


class TrainingBatches:
    """A task's training batches on a device, read when they are iterated over.

    Args:
        loader: Makes or gives what they come from.
        trainer: Tells the precision of the inputs, and is the Trainer of data that have none yet.
        data: Its batch hooks are called as in a fit; the batches are only moved if left out.
        device: Where the batches go.
    """

    def __init__(
        self, loader: Callable[[], Any], trainer: Trainer, data: LightningDataModule | None, device: torch.device
    ) -> None:
        self._loader = loader
        self._convert = trainer.precision_plugin.convert_input
        if data is not None and data.trainer is None:
            data.trainer = trainer
        self._data = data if data is not None else LightningDataModule()
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        loader, data = self._loader(), self._data
        if not is_one_loader(loader):
            raise ValueError(
                f"expected one loader from its train_dataloader, got a {type(loader).__name__}; batch_norm_batches=0 "
                "leaves the statistics of batch norms as the merge makes them."
            )
        for batch in loader:
            batch = data.on_before_batch_transfer(self._convert(batch), 0)
            yield data.on_after_batch_transfer(data.transfer_batch_to_device(batch, self._device, 0), 0)
