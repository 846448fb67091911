"""Models that are tried out: merged in memory, measured, and thrown away. Nothing is written."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Self

from lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_drm.data import MultiTaskDataModule, SampledData
from lightning_drm.deltas import TaskVector, load_tensors
from lightning_drm.evaluation import Candidates, Deltas, Predictions, RecordPredictions, Score, Split
from lightning_drm.fusion import Decompositions, Recipe, free_bytes
from lightning_drm.merging.low_rank import densify
from lightning_drm.modules import MultiTaskModule
from lightning_drm.training.letting_go import let_go
from lightning_drm.training.progress import merging_bar
from lightning_drm.training.run import Run

_MEMORY = 0.5  # of what is free: models that are measured need the rest


class RunCandidates(Candidates):
    """The models that recipes make of a run's task vectors, and their scores on one split of the tasks' data.

    What a model is made of is a mapping of names to deltas: of a merge, of a finetune, or of any mixture of these.
    Needs all of the run's tasks restored. As a context manager, it frees what its merges have kept for each other.

    Args:
        run: The run.
        split: Which samples measure a candidate.
        num_samples: How many of each task's, always the same ones, classes in proportion; all if left out.
    """

    def __init__(self, run: Run, split: Split = "validation", num_samples: int | None = None) -> None:
        self._run = run
        self.published = run.published
        self._measure_on(split, num_samples)
        self._unit: tuple[Recipe, Deltas] | None = None
        self._decompositions = Decompositions()
        self._propagated: list[tuple[Recipe, dict[str, TaskVector]]] = []

    def __enter__(self) -> Self:
        self._decompositions.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._decompositions.__exit__(*error)
        self._unit = None

    @property
    @override
    def tasks(self) -> list[str]:
        return self._run.session.tasks

    @property
    @override
    def recipe(self) -> Recipe:
        return self._run.session.recipe

    @property
    @override
    def vectors(self) -> dict[str, TaskVector]:
        return self._run.session.task_vectors

    @override
    def vectors_for(self, recipe: Recipe) -> dict[str, TaskVector]:
        if not recipe.method.propagate:
            return self.vectors
        for known, vectors in self._propagated:
            if known == recipe:
                return vectors
        self._propagated.append((recipe, self._run.vectors_for(recipe)))
        return self._propagated[-1][1]

    @cached_property
    @override
    def snapshots(self) -> dict[str, dict[int, TaskVector]]:
        return {task: self._run.folder.snapshots(task) for task in self.tasks}

    @cached_property
    @override
    def individual(self) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for task in self.tasks:
            found |= self.scores(self.of_task(task), [task], label=f"{task} · finetuned", own_statistics=True)
        return found

    @cached_property
    @override
    def base(self) -> dict[str, Score | None]:
        return {task: self._score_of_base(task) for task in self.tasks}

    @override
    def base_weights(self) -> dict[str, Tensor]:
        return self._run.session.base_weights(self._module)

    @override
    def of_task(self, task: str) -> Deltas:
        return _Dense(self.vectors[task])

    @override
    def merged(self, recipe: Recipe, vectors: Mapping[str, TaskVector] | None = None) -> Deltas:
        unit, scale = recipe.at_unit_scale()
        if vectors is not None:
            return _Scaled(self._merge([unit.for_tasks(list(vectors))], vectors)[0], scale)
        if self._unit is None or self._unit[0] != unit:
            self._unit = None  # before the next one comes
            self._unit = unit, self._merge([unit], None)[0]
        return _Scaled(self._unit[1], scale)

    @override
    def merged_side_by_side(self, recipes: Sequence[Recipe]) -> Iterator[Deltas]:
        size = sum(parameter.nbytes for parameter in self._module.parameters())
        together = max(1, int(_MEMORY * free_bytes(self._module.device) / max(1, size)))
        for start in range(0, len(recipes), together):
            part = recipes[start : start + together]
            what = f"{len(part)} methods" if len(part) > 1 else type(part[0].method).__name__
            with merging_bar(what, self._run.session.ranks) as progress:
                merged = self._merge(part, None, progress)
            while merged:
                yield merged.pop(0)

    @override
    def model(
        self,
        deltas: Deltas,
        tasks: Sequence[str] | None = None,
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        own_statistics: bool = False,
    ) -> MultiTaskModule:
        batches = None if own_statistics else self._run.modules.training_batches(self._run.trainer)
        return self._run.session.with_deltas(deltas.items(), self._module, tasks, heads=heads, batch_norm=batches)

    @override
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
        model = self.model(deltas, tasks, heads=heads, own_statistics=own_statistics)
        data = self.data(model.task_names)
        found = self._run.scoring.measure(model, data, label, split=self.split, intervals=intervals)
        del model
        let_go()
        self._run.interruptible.check()
        return found

    @override
    def predictions(self, deltas: Deltas, task: str, *, own_statistics: bool = False) -> Predictions | None:
        model, recorder = self.model(deltas, [task], own_statistics=own_statistics), RecordPredictions(task)
        scoring, data = self._run.scoring, self.data([task])
        scoring.measure(model, data, None, split=self.split, intervals=False, callbacks=[recorder])
        self._run.interruptible.check()
        return recorder.predictions

    @override
    def measured_on(self, split: Split, num_samples: int | None = None) -> Self:
        other = copy.copy(self)
        for measured in ("individual", "base"):
            vars(other).pop(measured, None)
        other._measure_on(split, num_samples)
        return other

    @override
    def data(self, tasks: Sequence[str]) -> MultiTaskDataModule:
        return self._data if list(tasks) == self.tasks else self._data.of_tasks(tasks)

    @cached_property
    def _module(self) -> LightningModule:
        """An untrained module. Made when it is needed: it may take the data to know how many classes there are."""
        return self._run.modules.make_known().to(self._run.trainer.strategy.root_device)

    def _measure_on(self, split: Split, num_samples: int | None) -> None:
        self.split: Split = split
        self._data = self._run.data if num_samples is None else SampledData(self._run.data.tasks, num_samples)

    def _score_of_base(self, task: str) -> Score | None:
        file = self._run.folder.base_head(task)
        if self.vectors[task].head and not file.is_file():
            return None
        heads = {task: load_tensors(file, "a head") if file.is_file() else {}}
        return self.scores({}, [task], label=f"{task} · base", heads=heads, own_statistics=True)[task]

    def _merge(
        self,
        recipes: Sequence[Recipe],
        vectors: Mapping[str, TaskVector] | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        kept = self._decompositions if vectors is None else None
        own = [self.vectors_for(recipe) if vectors is None else vectors for recipe in recipes]
        merged: list[dict[str, Tensor]] = [{} for _ in recipes]
        total = len({name for vector in (vectors or self.vectors).values() for name in vector.kinds})
        parameters = self._run.session.merge_side_by_side(recipes, self._module, vectors=own, decompositions=kept)
        for done, (name, deltas) in enumerate(parameters, 1):
            for model, delta in zip(merged, deltas, strict=True):
                model[name] = delta
            if progress is not None:
                progress(done, total)
            self._run.interruptible.check()
        return merged


class _Scaled(Mapping[str, Tensor]):
    """Tensors by name times a factor, made when they are asked for.

    Args:
        tensors: The tensors.
        factor: The factor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], factor: float) -> None:
        self._tensors = tensors
        self._factor = factor

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor if self._factor == 1.0 else tensor * self._factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Dense(Mapping[str, Tensor]):
    """A task vector's deltas by name, dense, made when they are asked for."""

    def __init__(self, vector: TaskVector) -> None:
        self._deltas = vector.deltas

    def __getitem__(self, name: str) -> Tensor:
        return densify(self._deltas[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)
