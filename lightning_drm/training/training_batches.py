"""A task's training batches outside of its fit, for the batch norms of the merged model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_drm.modules import own_batch_hooks


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
        module: Its batch hooks are called where the data have none.
    """

    def __init__(
        self,
        loader: Callable[[], Any],
        trainer: Trainer,
        data: LightningDataModule | None,
        device: torch.device,
        module: LightningModule,
    ) -> None:
        self._loader = loader
        self._convert = trainer.precision_plugin.convert_input
        if data is not None and data.trainer is None:
            data.trainer = trainer
        self._data = data if data is not None else LightningDataModule()
        self._device = device
        self._module = module if own_batch_hooks(module) else None  # or its weights would stay for nothing

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader()
        if not is_one_loader(loader):
            raise ValueError(
                f"expected one loader from its train_dataloader, got a {type(loader).__name__}; batch_norm_batches=0 "
                "leaves the statistics of batch norms as the merge makes them."
            )
        for batch in loader:
            batch = self._hook("on_before_batch_transfer")(self._convert(batch), 0)
            batch = self._hook("transfer_batch_to_device")(batch, self._device, 0)
            yield self._hook("on_after_batch_transfer")(batch, 0)

    def _hook(self, name: str) -> Callable[..., Any]:
        """The hook that Lightning would call: that of the data, if they define it."""
        by_module = name in own_batch_hooks(self._module) and name not in own_batch_hooks(self._data)
        return cast(Callable[..., Any], getattr(self._module if by_module else self._data, name))
