r"""Coefficients learned by a Lightning fit, in which nothing else is trained (AdaMerging, arXiv 2310.02575).

1. Merged weights are formed of the base, the tasks' parts and λ (`parts`).
2. One batch of each task goes through the task's own module around these weights, with its own head; the loss is the
   mean over tasks of `objective`. Adam changes λ alone.
3. After every few steps, the same loss is taken on samples that no step sees. Before the first step, too: the start is
   a candidate. The λ whose loss is lowest there is kept, and Lightning's `EarlyStopping` ends the fit when it has not
   fallen for a while.

What differs from the paper: it learns on the test samples for a fixed number of steps, and keeps the last λ; here test
sets take no part. It limits λ to [0, 1]; here it is free. Its loss is the entropy alone; here also the tasks' own loss.

Batch norms whose statistics finetuning has changed normalize each batch on itself, since the statistics of the merged
model are estimated again in the end.

Cost: a forward and a backward pass for each task and step, with the activations of one batch of every task in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_drm.modules import MultiTaskModule, by_batch_statistics
from lightning_drm.tuning.objective import Loss
from lightning_drm.tuning.parts import Parts

MONITOR = "loss"
"""The name under which the fit logs the loss by which it is judged."""


@dataclass(frozen=True)
class Check:
    """The loss on samples that no step sees.

    Attributes:
        step: After how many steps.
        losses: By task, its mean loss.
        learned: The mean loss of the steps since the check before, over all tasks; ``None`` before the first step.
    """

    step: int
    losses: Mapping[str, float]
    learned: float | None

    @property
    def loss(self) -> float:
        """The mean over tasks, by which the fit is judged."""
        return sum(self.losses.values()) / len(self.losses)


class CoefficientFit(LightningModule):
    """The fit of λ. A training batch holds a batch of each task by its name; there is one validation loader per task.

    Args:
        model: The tasks' modules around the base, with their finetuned heads; it stays as it is.
        parts: The merged weights as a function of λ.
        loss: The loss of one batch of one task.
        learning_rate: Adam's.
        num_judged: By task, how many samples its validation loader has.
        batch_size: How many of them a batch has, but for the last.
        by_batch: By task, its batch norms that normalize each batch on itself.

    Attributes:
        checks: All checks so far.
        best: The check with the lowest loss, the first one of equal ones, and λ (parameters or 1, N) at it.
    """

    def __init__(
        self,
        model: MultiTaskModule,
        parts: Parts,
        loss: Loss,
        *,
        learning_rate: float,
        num_judged: Mapping[str, int],
        batch_size: int,
        by_batch: Mapping[str, Sequence[_BatchNorm]],
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.parts = parts
        self.checks: list[Check] = []
        self.best: tuple[Check, Tensor] | None = None
        self._loss = loss
        self._learning_rate = learning_rate
        self._num_judged = num_judged
        self._batch_size = batch_size
        self._by_batch = by_batch
        self._judging: dict[str, Tensor] = {}
        self._sums: dict[str, float] = {}
        self._learned: list[Tensor] = []

    def weights(self) -> dict[str, Tensor]:
        """The merged weights by name, as λ has them now."""
        first = self.model.task_modules[0]
        found: dict[str, Tensor] = self.parts({name: _tensor(first, name) for name in self.parts.names})
        return found

    def loss_of(self, task: str, batch: Any, batch_idx: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The loss of one batch of one task with merged weights.

        Args:
            task: The task's name.
            batch: The batch.
            batch_idx: Its number.
            weights: The merged weights by name.
        """
        call = _Call(self.model.task_module(task), self._loss)
        tensors = {f"module.{name}": weight for name, weight in weights.items()}
        with by_batch_statistics(self._by_batch.get(task, ())):
            found: Tensor = functional_call(call, tensors, (batch, batch_idx, self._trainer))
        return found

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.parts.coefficients], lr=self._learning_rate)

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        weights = self.weights()
        losses = [self.loss_of(task, batch[task], batch_idx, weights) for task in self.model.task_names]
        loss = torch.stack([one.to(losses[0]) for one in losses]).mean()
        self._learned.append(loss.detach())
        return loss

    @override
    def on_validation_epoch_start(self) -> None:
        self._judging, self._sums = self.weights(), dict.fromkeys(self.model.task_names, 0.0)

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        task = self.model.task_names[dataloader_idx]
        count = min(self._batch_size, self._num_judged[task] - batch_idx * self._batch_size)
        self._sums[task] += count * float(self.loss_of(task, batch, batch_idx, self._judging))

    @override
    def on_validation_epoch_end(self) -> None:
        losses = {task: total / self._num_judged[task] for task, total in self._sums.items()}
        learned = float(torch.stack(self._learned).mean()) if self._learned else None
        check = Check(self.trainer.global_step, losses, learned)
        self._judging, self._learned = {}, []
        if not self.checks and (wrong := [task for task, loss in losses.items() if not isfinite(loss)]):
            raise ValueError(f"The loss of {', '.join(wrong)} is no finite number where the coefficients start.")
        self.checks.append(check)
        if self.best is None or check.loss < self.best[0].loss:
            self.best = check, self.parts.coefficients.detach().cpu().clone()
        self.log(MONITOR, check.loss, prog_bar=True)


class _Call(nn.Module):
    """A task's loss as a forward pass, in which `functional_call` can put other weights into the task's module."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    @override
    def forward(self, batch: Any, batch_idx: int, trainer: Any) -> Tensor:
        return self.loss(self.module, batch, batch_idx, trainer)


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer as it is now: moving a module to a device makes new buffers."""
    owner, _, own = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), own)
    return found
