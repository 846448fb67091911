"""What is merged: the deltas of all tasks for one parameter, or for a piece of it, on the device that computes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

from lightning_drm.deltas import Kind, TaskVector, describe_difference
from lightning_drm.fusion.read_ahead import read_ahead
from lightning_drm.merging import Delta, LowRank, Need, Statistics

Piece: TypeAlias = tuple[str, slice | None]
"""A parameter's name and the rows that are meant; ``None`` for all of them."""


class TaskDeltas:
    """The deltas of several task vectors, one parameter of all tasks at a time.

    Tasks are taken in the order of their names, whatever order they came in, so that rounding is the same, too. A
    parameter that a task did not train has a delta of zeros there.

    Args:
        vectors: The task vectors, at least one.
        device: Where deltas are brought to.

    Attributes:
        tasks: The tasks' names, in order.
        kinds: By name, what each parameter is to its layer.

    Raises:
        ValueError: If task vectors come from different bases or disagree on a parameter's kind.
    """

    def __init__(self, vectors: Sequence[TaskVector], device: torch.device) -> None:
        self._vectors = sorted(vectors, key=lambda vector: vector.task)
        self.device = device
        self.tasks = [vector.task for vector in self._vectors]
        self.kinds = _agreed_kinds(self._vectors)

    def read(self, name: str, rows: slice | None = None) -> list[Delta]:
        """One parameter's delta from every task.

        Args:
            name: Which parameter.
            rows: Which rows of it; all if left out.

        Raises:
            ValueError: If the deltas differ in shape.
        """
        found = [vector.read(name, rows) for vector in self._vectors]
        present = [delta for delta in found if delta is not None]
        if len({tuple(delta.shape) for delta in present}) > 1:
            shapes = ", ".join(
                f"{task} {tuple(delta.shape)}"
                for task, delta in zip(self.tasks, found, strict=True)
                if delta is not None
            )
            raise ValueError(f"{name}: the tasks' deltas have different shapes: {shapes}.")
        return [delta.to(self.device) if delta is not None else self._zeros_like(present[0]) for delta in found]

    def stream(self, pieces: Iterable[Piece]) -> Iterator[list[Delta]]:
        """What `read` gives for one piece after another; a thread reads the next one ahead."""
        return read_ahead(self.read(name, rows) for name, rows in pieces)

    def statistics(self, name: str, need: Need, rows: slice | None = None) -> list[Statistics]:
        """What a method needs of a parameter from every task, on the device: of a parameter of which all have such.

        Args:
            name: Which parameter.
            need: What the method needs.
            rows: Which rows of it; all if left out.
        """
        found = [vector.statistics.read(name, need) for vector in self._vectors if vector.statistics is not None]
        return [(one if rows is None else one.of_rows(rows)).to(self.device) for one in found]

    def present(self, name: str) -> dict[str, Delta]:
        """By task, the deltas of a parameter as they are stored, from those tasks that have one."""
        return {vector.task: vector.deltas[name] for vector in self._vectors if name in vector.deltas}

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, for which one task's delta may have to be computed."""
        return tuple(next(vector.deltas[name].shape for vector in self._vectors if name in vector.deltas))

    def explained(self, error: ValueError, name: str) -> ValueError:
        """A method's error, which counts tasks, with the names of the parameter and the tasks."""
        numbered = ", ".join(f"{index} is {task}" for index, task in enumerate(self.tasks))
        return ValueError(f"{name}: {error} (task {numbered}).")

    def _zeros_like(self, delta: Delta) -> Delta:
        if isinstance(delta, LowRank):
            *stack, rows, columns = delta.shape
            up = torch.zeros(*stack, rows, 0, dtype=delta.up.dtype, device=self.device)
            return type(delta)(up, torch.zeros(*stack, 0, columns, dtype=delta.down.dtype, device=self.device))
        return torch.zeros(delta.shape, dtype=delta.dtype, device=self.device)


def _agreed_kinds(vectors: Sequence[TaskVector]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    owners: dict[str, str] = {}
    for vector in vectors:
        if vector.base_hashes != vectors[0].base_hashes:
            difference = describe_difference(vectors[0].base_hashes, vector.base_hashes)
            raise ValueError(
                f"Tasks {vectors[0].task!r} and {vector.task!r} were finetuned from different bases: {difference}."
            )
        for name in vector.deltas:
            kind, owner = kinds.setdefault(name, vector.kinds[name]), owners.setdefault(name, vector.task)
            if kind != vector.kinds[name]:
                raise ValueError(
                    f"The tasks disagree on {name}: its kind is {kind!r} in task {owner!r} and {vector.kinds[name]!r} "
                    f"in task {vector.task!r}."
                )
    return kinds
