"""What a task's training data say of one of its parameters, for the methods that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor

from lightning_drm.merging.inputs import refuse
from lightning_drm.merging.scaling import peak

Need: TypeAlias = Literal["gram", "fisher"]
"""What a method needs of a task's data: the Gram matrices of its layers' inputs, or diagonal Fisher information."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one task for one parameter; what was not collected is ``None``.

    Attributes:
        gram: Mean of x xᵀ over the inputs x of the layer, (n, n) for a weight (m, n); (E, n, n) for E experts.
        fisher: Diagonal Fisher information, in the shape of the parameter.
        fisher_norm: Euclidean norm of the task's Fisher information over its whole model; that of ``fisher`` alone if
            left out.
    """

    gram: Tensor | None = None
    fisher: Tensor | None = None
    fisher_norm: float | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        gram, fisher = (None if tensor is None else tensor.to(device) for tensor in (self.gram, self.fisher))
        return type(self)(gram, fisher, self.fisher_norm)

    def of_rows(self, rows: slice) -> Self:
        """Those of some rows of a parameter, which are experts where it has those of a layer, as views."""
        gram, fisher = self.gram, self.fisher
        if gram is not None and gram.ndim == 3:
            gram = gram[rows]  # all rows of a matrix have the same inputs
        return type(self)(gram, None if fisher is None else fisher[rows], self.fisher_norm)

    def of_expert(self, index: int) -> Self:
        """Those of one expert, of those of all experts of a layer."""
        gram, fisher = (None if tensor is None else tensor[index] for tensor in (self.gram, self.fisher))
        return type(self)(gram, fisher, self.fisher_norm)


def check_statistics(
    owner: str,
    need: Need,
    statistics: Sequence[Statistics] | None,
    num_tasks: int,
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """Refuse statistics that a method cannot use.

    Args:
        owner: Name of the method, for the message.
        need: Which of them it needs.
        statistics: One for each task.
        num_tasks: Number of tasks.
        shape: The shape of the deltas.
        device: Where they are.

    Raises:
        ValueError: If they are missing, of another number or shape than the deltas, on another device, not finite, or
            negative where they are squares; names the tasks by their positions.
    """
    if statistics is None:
        raise ValueError(f"{owner} needs statistics of the tasks' data ({need}), one for each task, got none")
    if len(statistics) != num_tasks:
        raise ValueError(f"{owner}: {num_tasks} deltas need {num_tasks} statistics, got {len(statistics)}")
    expected = (shape[-1], shape[-1]) if need == "gram" else tuple(shape)
    refuse(owner, (_problem(task, need, one, expected, device) for task, one in enumerate(statistics)))


def _problem(
    task: int, need: Need, statistics: Statistics, expected: tuple[int, ...], device: torch.device
) -> str | None:
    found = getattr(statistics, need, None)
    if not isinstance(found, Tensor):
        return f"statistics of task {task} have no {need}"
    if tuple(found.shape) != expected:
        return f"{need} of task {task} has shape {tuple(found.shape)}, expected {expected}"
    if found.device != device:
        return f"{need} of task {task} is on {found.device}, its delta on {device}"
    if not found.is_floating_point() or not peak(found).isfinite():
        return f"{need} of task {task} holds NaN or infinite values, or no floats"
    squares = found if need == "fisher" else found.diagonal()
    return f"{need} of task {task} has negative squares" if bool((squares < 0).any()) else None
