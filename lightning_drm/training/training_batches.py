"""A task's training batches outside of its fit: for batch norms of the merged model, and the head on the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import CombinedLoader

from lightning_drm.modules import BATCH_HOOKS, has_hook


def is_one_loader(loader: Any) -> bool:
    """Whether training data come from one loader: of several, it is not known what a batch of the task is."""
    return loader is not None and not isinstance(loader, Sequence | Mapping | CombinedLoader)


class TrainingBatches:
    """A task's training batches on a device, read when they are iterated over.

    Args:
        loader: Makes or gives what they come from.
        strategy: Tells the precision of the inputs, and the device.
        data: Its batch hooks are called as in a fit; the batches are only moved if left out.
        module: Its batch hooks are called where the data have none.
    """

    def __init__(
        self,
        loader: Callable[[], Any],
        strategy: Strategy,
        data: LightningDataModule | None,
        module: LightningModule,
    ) -> None:
        self._loader = loader
        self._convert = strategy.precision_plugin.convert_input
        self._data = data if data is not None else LightningDataModule()
        self._device = strategy.root_device
        # Or its weights would stay for nothing.
        self._module = module if any(has_hook(hook, module) for hook in BATCH_HOOKS) else None

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
        by_module = has_hook(name, self._module) and not has_hook(name, self._data)
        return cast(Callable[..., Any], getattr(self._module if by_module else self._data, name))
