"""The samples of an evaluation batch that count: without those that repeat others for other processes."""

from collections.abc import Mapping
from typing import Any, cast

from lightning import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_drm.data.sharing import Share, exactness_problem, num_replicas


def own_samples(module: LightningModule, batch: Any, batch_idx: int) -> tuple[Any, bool]:
    """A batch of a module's own validation or test without samples that repeat others for other processes.

    Args:
        module: The module. Inside the merged module, which has done this, batches are left as they are.
        batch: The batch.
        batch_idx: Its number.

    Returns:
        The batch, and whether it counts: one that repeats only is whole, as a sharded module needs all processes.

    Raises:
        ValueError: If samples cannot be left out.
    """
    trainer = module.trainer
    if trainer.lightning_module is not module:
        return batch, True
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    if isinstance(loaders, list | tuple):
        loaders = loaders[0]
    if not batch_idx and num_replicas(trainer) > 1 and (problem := exactness_problem(loaders)):
        raise ValueError(f"The evaluation loader {problem}.")
    share = Share.of(loaders, batch_idx)
    return (batch, share.new != 0) if share.new in (0, share.size) else (first_samples(batch, share), True)


def first_samples(batch: Any, share: Share) -> Any:
    """The samples of a batch that count, which are its first ones.

    Args:
        batch: Tensors, and lists with an entry per sample, in any collections.
        share: Which samples count.

    Raises:
        ValueError: If it holds something whose samples are not known.
    """

    def first(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) == share.size:
            return tensor[: share.new]
        if tensor.ndim:
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}")
        return tensor

    def is_samples(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == share.size and not _of_batches(value, share.size)

    if is_samples(batch):
        return batch[: share.new]
    if isinstance(batch, Mapping):
        return cast(Any, type(batch))({key: first_samples(value, share) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        parts = [first_samples(value, share) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    shortened = apply_to_collection(batch, Tensor, first)
    if shortened is batch and not isinstance(batch, int | float | str | bool | None | Tensor):
        raise ValueError(f"it holds a {type(batch).__name__}")
    return shortened


def _of_batches(values: Any, size: int | None) -> bool:
    """Whether a list holds whole batches, such as inputs and targets, and not one entry for each sample."""
    return any(isinstance(value, Tensor) and value.ndim and len(value) == size for value in values)
