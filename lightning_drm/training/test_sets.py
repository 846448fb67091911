"""What tells one test or validation set from another, so that scores on different ones never stand in one table."""

from collections.abc import Mapping
from typing import Any

import xxhash
from lightning import LightningDataModule
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_drm.deltas import hash_tensor
from lightning_drm.evaluation import Split
from lightning_drm.training.settings import flatten

_TRAINER_ARGUMENTS = ("limit_test_batches", "precision")  # those that change a score


def fingerprint_of_samples(data: LightningDataModule, arguments: Mapping[str, Any], split: Split = "test") -> str:
    """A hash of how a test or validation set is made, of its size, and of its first batch; the rest is not read.

    Args:
        data: A task's data module; its saved hyper-parameters count.
        arguments: Arguments of the Trainer that measures.
        split: Which of the two.
    """
    trainer, data.trainer = data.trainer, None  # several processes would each get another part of the set
    try:
        return _fingerprint(data, arguments, split)
    finally:
        data.trainer = trainer


def _fingerprint(data: LightningDataModule, arguments: Mapping[str, Any], split: Split) -> str:
    made = {"class": type(data).__qualname__, **data.hparams}
    used = {name: arguments.get(name) for name in _TRAINER_ARGUMENTS}
    digest = xxhash.xxh3_128(repr(sorted(flatten({"data": made, "trainer": used}))).encode())
    with isolate_rng():  # loaders draw random numbers, and training must not depend on a look at other samples
        data.prepare_data()
        data.setup("test" if split == "test" else "validate")
        loaders = data.test_dataloader() if split == "test" else data.val_dataloader()
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            for counted in (loader, getattr(loader, "dataset", None)):
                digest.update(f"{sized_len(counted)} ".encode())
            first = next(iter(loader), None)
            apply_to_collection(first, Tensor, lambda tensor: digest.update(hash_tensor(tensor).encode()))
    return digest.hexdigest()
