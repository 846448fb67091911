"""One task of a plan: which of its parameters is which of the base's, and everything that is wrong."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_drm.checkpoints.architecture import ExpertPart
from lightning_drm.checkpoints.reading import TaskInput
from lightning_drm.deltas import TaskStatistics


@dataclass
class PlannedTask:
    """One task, matched with the base. Names are the base's where nothing else is said.

    Attributes:
        name: The task's name.
        input: Its files.
        names: By name, the task's own name of every parameter that has a delta.
        transposed: Names of the parameters whose factors are for the transposed weight.
        head: The task's own names of its head's parameters.
        missing: Names of the parameters that the task should have but lacks.
        unfit: Names of the parameters whose shape does not fit the base's.
        parts: By name, which part of the task's own tensor is meant, where only that holds all experts of a layer.
        stacked: By name, the task's own names of the tensors that make it up, where the base holds all experts in one.
        rows: By name, the task's row for each row of the base, where vocabularies differ.
        problems: What keeps the task from being merged.
        notes: What a user should know.
    """

    name: str
    input: TaskInput
    names: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    head: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unfit: set[str] = field(default_factory=set)
    parts: dict[str, ExpertPart] = field(default_factory=dict)
    stacked: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stacks(self) -> dict[str, list[str]]:
        """By the task's own name of a tensor with all experts, the names of its parts, in their order."""
        found: dict[str, list[str]] = {}
        for name in self.parts:
            found.setdefault(self.names[name], []).append(name)
        return found

    @property
    def statistics(self) -> TaskStatistics | None:
        """What was collected of its training data, of the parameters that the base holds in the same way."""
        if self.input.statistics is None:
            return None
        other = {*self.transposed, *self.parts, *self.stacked, *self.rows}
        return self.input.statistics.renamed({name: raw for name, raw in self.names.items() if name not in other})

    def raw_names(self) -> set[str]:
        """The task's own names of every tensor that is read."""
        return {*self.names.values(), *(raw for raws in self.stacked.values() for raw in raws)}
