"""Measuring a multi-task module with a Trainer of its own, so that no other Trainer's state is touched."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningDataModule, Trainer

from lightning_drm.modules import MultiTaskModule

_HARDWARE = (
    "accelerator",
    "devices",
    "inference_mode",
    "limit_test_batches",
    "num_nodes",
    "plugins",
    "precision",
    "strategy",
)


def measure(
    module: MultiTaskModule, data: LightningDataModule, arguments: Mapping[str, Any], callbacks: list[Callback]
) -> dict[str, float]:
    """Tests a module on the test sets of its tasks.

    Args:
        module: The module; its tasks are in the order of the test dataloaders.
        data: The data module.
        arguments: Arguments of a Trainer, of which those about hardware and test sets are used.
        callbacks: Callbacks of the test, such as a progress bar.

    Returns:
        Micro accuracy by task, as a fraction.
    """
    trainer = Trainer(
        **{name: arguments[name] for name in _HARDWARE if name in arguments},
        callbacks=callbacks,
        enable_progress_bar=bool(callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return {task: float(trainer.callback_metrics[f"accuracy/{task}"]) for task in module.task_names}
