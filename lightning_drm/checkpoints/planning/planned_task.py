"""One task of a plan: which of its parameters is which of the base's, and everything that is wrong."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_drm.checkpoints.reading import TaskInput


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
    rows: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
