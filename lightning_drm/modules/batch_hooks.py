"""A task's own batch hooks: what a module or its data do to a batch on its way to the device."""

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def own_batch_hooks(owner: object) -> set[str]:
    """The batch hooks that a module or a data module defines itself.

    Args:
        owner: It.
    """
    if not isinstance(owner, LightningModule | LightningDataModule):
        return set()
    return {hook for hook in BATCH_HOOKS if is_overridden(hook, owner)}
