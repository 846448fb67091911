"""What a study of merges works with: task vectors, the models that recipes make of them, and those models' scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lightning_drm.data import MultiTaskDataModule
from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation.measure import Split
from lightning_drm.evaluation.predictions import Predictions
from lightning_drm.evaluation.published import Published
from lightning_drm.evaluation.score import Score
from lightning_drm.fusion import Recipe
from lightning_drm.modules import MultiTaskModule

Deltas = Mapping[str, Tensor]
"""Dense deltas by parameter name, of which a model is made: those of a merge, of a finetune, or any mixture."""


class Candidates(ABC):
    """The models that can be made of some task vectors, and their scores on one split of the tasks' data.

    Attributes:
        split: Which samples measure a candidate.
        published: What was published about the model, for runs that repeat the paper's experiments.
    """

    split: Split
    published: Published | None = None

    @property
    @abstractmethod
    def tasks(self) -> list[str]:
        """The tasks' names."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """The recipe that is configured."""

    @property
    @abstractmethod
    def vectors(self) -> dict[str, TaskVector]:
        """By task, its task vector."""

    def vectors_for(self, recipe: Recipe) -> dict[str, TaskVector]:
        """By task, what a recipe merges: `vectors`, unless its method takes statistics from the merge itself."""
        return self.vectors

    @property
    @abstractmethod
    def snapshots(self) -> dict[str, dict[int, TaskVector]]:
        """By task, and by number of steps in order: its task vectors of before its training ended."""

    @property
    def snapshots_of_all(self) -> dict[int, dict[str, TaskVector]]:
        """By number of steps, in order, and by task: the snapshots of steps of which all tasks have one."""
        found = self.snapshots
        steps = set.intersection(*(set(snapshots) for snapshots in found.values()))
        return {step: {task: found[task][step] for task in self.tasks} for step in sorted(steps)}

    @property
    @abstractmethod
    def individual(self) -> dict[str, Score]:
        """By task, the score of its own finetune; measured once."""

    @property
    @abstractmethod
    def base(self) -> dict[str, Score | None]:
        """By task, the score of the untouched backbone with the head that was trained on it, where it has; once."""

    @abstractmethod
    def base_weights(self) -> dict[str, Tensor]:
        """The base's tensors by name."""

    @abstractmethod
    def of_task(self, task: str) -> Deltas:
        """The deltas of a task's own finetune, by parameter name, each made when it is asked for."""

    @abstractmethod
    def merged(self, recipe: Recipe, vectors: Mapping[str, TaskVector] | None = None) -> Deltas:
        """The merged deltas under a recipe, by parameter name.

        A recipe that differs from the one before in the method's scale only is not merged again, and one whose method
        needs no other preparation is not decomposed again.

        Args:
            recipe: How to merge.
            vectors: By task, what to merge, such as some of the tasks; all task vectors if left out.

        Raises:
            ValueError: If the recipe does not fit.
        """

    @abstractmethod
    def merged_side_by_side(self, recipes: Sequence[Recipe]) -> Iterator[Deltas]:
        """What `merged` gives for one recipe after another, reading deltas once for as many as fit into memory.

        Args:
            recipes: How to merge.
        """

    @abstractmethod
    def model(
        self,
        deltas: Deltas,
        tasks: Sequence[str] | None = None,
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        own_statistics: bool = False,
    ) -> MultiTaskModule:
        """The base plus any deltas, as a model.

        Args:
            deltas: Deltas by parameter name; all other parameters are the base's.
            tasks: The tasks that it is to have; all if left out.
            heads: By task, its head's tensors by name; those that were finetuned if left out.
            own_statistics: Whether batch norms keep the running statistics that the deltas make, as those of a finetune
                are right; those of a merge are estimated again.
        """

    @abstractmethod
    def scores(
        self,
        deltas: Deltas,
        tasks: Sequence[str] | None = None,
        *,
        label: str | None = None,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        own_statistics: bool = False,
        intervals: bool = True,
    ) -> dict[str, Score]:
        """Score by task of a model.

        Args:
            deltas: As for `model`.
            tasks: Which tasks are measured; all if left out.
            label: What a progress bar says; none is shown if left out.
            heads: As for `model`.
            own_statistics: As for `model`.
            intervals: Whether scores get their intervals, which take longer.
        """

    @abstractmethod
    def predictions(self, deltas: Deltas, task: str, *, own_statistics: bool = False) -> Predictions | None:
        """What a model says of each sample of a task; ``None`` where that is not one class per sample.

        Args:
            deltas: As for `model`.
            task: The task's name.
            own_statistics: As for `model`.
        """

    @abstractmethod
    def measured_on(self, split: Split, num_samples: int | None = None) -> "Candidates":
        """The same candidates, measured on other samples. What is merged or decomposed serves both.

        Args:
            split: Which samples.
            num_samples: How many of each task's; all if left out.
        """

    @abstractmethod
    def data(self, tasks: Sequence[str]) -> MultiTaskDataModule:
        """The data of some tasks, as they are measured."""
