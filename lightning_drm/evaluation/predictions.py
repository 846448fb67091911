"""Predicted and true classes of every sample, seen while a model is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_drm.kinds import Classification
from lightning_drm.modules import MultiTaskModule
from lightning_drm.modules.protocol import can_classify, classify


@dataclass(frozen=True)
class Predictions:
    """What a model says of the samples of a task that has one class per sample.

    Attributes:
        predicted: The number of each sample's predicted class ``(samples,)``.
        target: The number of its true class ``(samples,)``.
        num_classes: How many classes there are.
    """

    predicted: Tensor
    target: Tensor
    num_classes: int


class RecordPredictions(Callback):
    """Notes a task's predictions while a model of that task alone is tested or validated.

    Args:
        task: The task's name.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._predicted: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._num_classes = 0
        self._fits = True

    @property
    def predictions(self) -> Predictions | None:
        """What was noted; ``None`` for a task without one class per sample."""
        if not self._fits or not self._predicted:
            return None
        return Predictions(torch.cat(self._predicted), torch.cat(self._targets), self._num_classes)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._note(trainer, pl_module, batch)

    on_validation_batch_end = on_test_batch_end

    def _note(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        assert isinstance(module, MultiTaskModule)
        own = module.task_module(self._task)
        kind = getattr(own, "kind", None)
        self._fits = self._fits and can_classify(own, batch) and (kind is None or isinstance(kind, Classification))
        if not self._fits:
            return
        with trainer.precision_plugin.forward_context():
            logits, targets = classify(own, batch)
        whole_numbers = not targets.is_floating_point() and not targets.is_complex()
        self._fits = logits.ndim == 2 and targets.shape == logits.shape[:1] and whole_numbers
        if self._fits:
            self._predicted.append(logits.argmax(-1).cpu())
            self._targets.append(targets.cpu())
            self._num_classes = logits.shape[-1]
