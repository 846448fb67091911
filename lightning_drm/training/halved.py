"""The validation samples that coefficients are learned from, and those that the learning is judged on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_drm.data import halves, num_rows
from lightning_drm.training.run import Run
from lightning_drm.training.training_batches import TrainingBatches

BATCH_SIZE = 16
"""Samples of each task in a step of AdaMerging (arXiv 2310.02575)."""


class Endless:
    """Batches that begin again whenever they end, as tasks have different numbers of them.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self._batches


@dataclass(frozen=True)
class Halved:
    """Each task's validation samples in two halves, classes in proportion.

    Attributes:
        learned_from: By task, batches of one half, in another order each time.
        judged: By task, batches of the other half.
        sizes: By task, how many samples each half has.
    """

    learned_from: Mapping[str, TrainingBatches]
    judged: Mapping[str, TrainingBatches]
    sizes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, run: Run, num_samples: int | None, seed: int) -> "Halved":
        """The halves of a run's validation sets, on its device.

        Args:
            run: The run.
            num_samples: How many samples of each task take part; all if left out.
            seed: Decides which sample is in which half, and the order of those to learn from.

        Raises:
            ValueError: If the samples of a task cannot be divided so.
        """
        data = run.modules.prepared(run.trainer)
        found = halves(data, num_samples, batch_size=BATCH_SIZE, seed=seed)
        strategy, template = run.trainer.strategy, run.modules.template

        def batches(task: str, loader: DataLoader[Any]) -> TrainingBatches:
            return TrainingBatches(lambda: loader, strategy, data.tasks[task], template)

        return cls(
            {task: batches(task, first) for task, (first, _) in found.items()},
            {task: batches(task, second) for task, (_, second) in found.items()},
            {task: (num_rows(first), num_rows(second)) for task, (first, second) in found.items()},
        )
