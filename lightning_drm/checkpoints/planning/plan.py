"""The plan of a merge of checkpoints: what will be done with each parameter, and everything that is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.planning.policy import MismatchPolicy
from lightning_drm.checkpoints.reading import BaseModel, TensorHeader
from lightning_drm.deltas import Kind
from lightning_drm.fusion.described import described
from lightning_drm.fusion.recipe import Recipe, Treatment


@dataclass
class Plan:
    """What will be done with each parameter.

    Attributes:
        base: The base.
        recipe: How to merge.
        mismatch: What to do about what does not fit.
        tasks: The tasks, in the order of their names.
        transposed: Names of the weights that are stored (in, out).
        kinds: By name, what each merged parameter is to its layer.
        treatments: By name, what is done to it.
        headers: By name, every tensor of a whole merged model, as it will be written.
        output_format: ``full`` or ``adapter``.
        problems: Everything that keeps the merge from being done.
        notes: Everything that a user should know.
    """

    base: BaseModel
    recipe: Recipe
    mismatch: MismatchPolicy
    tasks: list[PlannedTask] = field(default_factory=list)
    transposed: frozenset[str] = frozenset()
    kinds: dict[str, Kind] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    headers: dict[str, TensorHeader] = field(default_factory=dict)
    output_format: Literal["full", "adapter"] = "full"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of each merged parameter."""
        return {name: self.base.tensors.headers[name].shape for name in self.kinds}

    @property
    def in_pieces(self) -> frozenset[str]:
        """Names of the parameters that are merged a few rows at a time: entry by entry, from files that are mapped."""
        if not (self.base.tensors.is_mapped and all(task.input.is_mapped for task in self.tasks)):
            return frozenset()
        return frozenset(name for name, treatment in self.treatments.items() if treatment.works_in_pieces)

    @property
    def kept(self) -> list[str]:
        """Names of the tensors that stay as in the base."""
        return [name for name in self.headers if name not in self.kinds]


@dataclass(frozen=True)
class PlannedRule:
    """A rule, and some of the parameters to which it applies: those that are alike.

    Attributes:
        rule: The rule; ``kept`` for tensors that no task changes.
        method: The method that it means; a dash for none.
        what: What the parameters are, in words.
        names: Their names.
        num_values: How many values they have together.
        cost: What they cost together, in the unit of `Method.cost`.
    """

    rule: str
    method: str
    what: str
    names: tuple[str, ...]
    num_values: int
    cost: float


def table(plan: Plan, costs: Mapping[str, float]) -> list[PlannedRule]:
    """The rules that apply.

    Args:
        plan: The plan.
        costs: By name, what each tensor costs.
    """
    rows: dict[tuple[str, str, str], list[str]] = {}
    shapes = plan.shapes
    for name, treatment in plan.treatments.items():
        what = described(plan.kinds[name], shapes[name])
        key = treatment.rule, repr(treatment.method) if treatment.method else "–", what
        rows.setdefault(key, []).append(name)
    if plan.kept:
        rows["kept", "–", "–"] = plan.kept
    headers: Mapping[str, TensorHeader] = plan.headers
    return [
        PlannedRule(
            *key,
            tuple(names),
            sum(prod(headers[name].shape) for name in names),
            sum(costs[name] for name in names),
        )
        for key, names in rows.items()
    ]


def refuse(problems: Sequence[str]) -> None:
    """Raises one error with all problems.

    Raises:
        ValueError: If there are any.
    """
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        raise ValueError(f"This cannot be merged, {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
