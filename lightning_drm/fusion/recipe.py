"""A recipe: the method, the parameters it applies to, one coefficient per task, and the exceptions."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, Self, TypeAlias, get_args

from lightning_drm import merging
from lightning_drm.deltas import Kind
from lightning_drm.merging import DRM, TIES, LiNeS, Method, TaskArithmetic
from lightning_drm.merging.inputs import weights

Rule = Literal["method", "average", "elect", "base"]
"""The recipe's method; the weighted average; the average of the entries that agree in sign; the base's value."""

Split: TypeAlias = int | list[int]
"""A number of equal parts, or the size of each part."""


@dataclass(frozen=True)
class Override:
    """Another treatment for the parameters whose name matches; what is left out stays as in the recipe.

    Attributes:
        match: Shell pattern for the whole name, such as ``*.layers.0.*``.
        rule: How to merge them.
        density: The method's density for them.
        coefficients: By task, another coefficient.
        split: Merge the matrix in parts, as for a fused ``[Q; K; V]``: a number of equal parts, or the rows of each
            part (the columns, in a Conv1D). Of experts, each one's matrix.
    """

    match: str
    rule: Rule | None = None
    density: float | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    split: Split | None = None


@dataclass(frozen=True)
class Treatment:
    """What is done to one parameter.

    Attributes:
        rule: The rule that applies.
        method: The method that merges it; ``None`` keeps the base's value.
        coefficients: One per task.
        split: The parts of the matrix, if it is merged in parts.
        expert_by_expert: Whether the parameter is a stack of matrices (E, m, n), each of which is merged by itself.
    """

    rule: Rule
    method: Method | None
    coefficients: tuple[float, ...]
    split: Split | None = None
    expert_by_expert: bool = False

    @property
    def works_in_pieces(self) -> bool:
        """Whether some rows can be merged without the others; a stack's rows are its matrices."""
        if self.expert_by_expert:
            return True
        return self.split is None and (self.method is None or self.method.works_in_pieces)

    def matrix_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of what the method merges one after another.

        Args:
            shape: The parameter's shape. Where the parts of a split do not add up to its rows, they are columns.
        """
        if self.expert_by_expert:
            return shape[0] * replace(self, expert_by_expert=False).matrix_shapes(shape[1:])
        if self.split is not None and len(shape) == 2:
            rows, columns = shape
            if isinstance(self.split, list) and sum(self.split) != rows:
                return [(rows, size) for size in self.split]
            return [(size, columns) for size in split_sizes(self.split, rows)]
        if self.method is not None and not self.method.elementwise and len(shape) > 2:
            return [(shape[0], prod(shape[1:]))]
        return [shape]


@dataclass(frozen=True)
class Recipe:
    """What is done to each parameter of the backbone. Heads are never merged.

    A method on matrices (all but the elementwise ones) merges the weights of linear layers, and those of experts one
    expert after another. Embeddings, biases, norms and buffers get the average weighted by the coefficients, times the
    method's ``scale`` (arXiv 2505.23117 gives them the average; its published code elects signs there). The same holds
    for the output embeddings of a language model (``lm_head``), unless an override gives them the rule ``"method"``. An
    elementwise method (averaging, task arithmetic, TIES, DARE-TIES) is defined on whole task vectors and merges every
    parameter. A method that needs statistics of the tasks' data merges what they were collected of, and leaves the rest
    to the average; where its coefficients are the weights of a mean, they are so in this average.

    With LiNeS around a method, all of this is that method's, and what it has made of a parameter is scaled afterwards.

    Attributes:
        method: The merging method.
        coefficients: By task, its coefficient; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` lets a matrix method merge convolution weights as ``(out, in·k·k)`` matrices;
            ``"average"`` treats them like embeddings.
        non_matrix: How to merge what a matrix method does not take: by the weighted ``"average"`` of all tasks, or, as
            in DRM's published code, of those that ``"elect"`` the same sign.
        overrides: Exceptions by name; the first one that matches a parameter applies.
    """

    method: Method = field(default_factory=DRM)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    convolutions: Literal["average", "matrix"] = "average"
    non_matrix: Literal["average", "elect"] = "average"
    overrides: Sequence[Override] = ()

    @property
    def inner_method(self) -> Method:
        """The method that merges: the one that LiNeS is around, or else `method` itself."""
        return self.method.method if isinstance(self.method, LiNeS) else self.method

    def rule(self, kind: Kind) -> Rule:
        """The rule for a parameter of some kind, exceptions aside."""
        if self.inner_method.elementwise or kind in ("matrix", "experts"):
            return "method"
        return "method" if kind == "convolution" and self.convolutions == "matrix" else self.non_matrix

    def override_of(self, name: str) -> Override:
        """The exception that applies to a parameter; an empty one if none does."""
        return next((o for o in self.overrides if fnmatchcase(name, o.match)), Override(name))

    def treatment(self, name: str, kind: Kind, tasks: Sequence[str], *, informed: bool = True) -> Treatment:
        """What is done to a parameter.

        Args:
            name: Its name.
            kind: What it is to its layer.
            tasks: The tasks, in their order.
            informed: Whether there are the statistics that the method needs; else it does not take the parameter.
        """
        override, inner = self.override_of(name), self.inner_method
        rule = override.rule or self.rule(kind)
        if rule == "method" and self.method.needs is not None and not informed:
            rule = self.non_matrix
        values = {**self.coefficients, **override.coefficients}
        coefficients = tuple(values.get(task, 1.0) for task in tasks)
        if rule == "base":
            return Treatment(rule, None, coefficients)
        if rule != "method" and self.method.weighs:
            coefficients = tuple(len(tasks) * weight for weight in weights(type(self.method).__name__, coefficients))
        if rule == "average":
            method: Method = TaskArithmetic(inner.scale / len(tasks))
        elif rule == "elect":
            method = TIES(1.0, "tensor", inner.scale)
        else:
            method = inner if override.density is None else with_density(inner, override.density)
        return Treatment(rule, method, coefficients, override.split, kind == "experts" and not method.elementwise)

    def for_tasks(self, tasks: Sequence[str]) -> Self:
        """The recipe for some of its tasks, without the coefficients of all others."""

        def of_these(coefficients: Mapping[str, float]) -> dict[str, float]:
            return {task: value for task, value in coefficients.items() if task in tasks}

        overrides = [replace(o, coefficients=of_these(o.coefficients)) for o in self.overrides]
        return replace(self, coefficients=of_these(self.coefficients), overrides=overrides)

    def at_unit_scale(self) -> tuple[Self, float]:
        """The recipe with a method of scale 1, and the factor by which its merged deltas then differ."""
        arguments = self.method.hyperparameters()
        if "scale" not in arguments:
            return self, 1.0
        return replace(self, method=type(self.method)(**{**arguments, "scale": 1.0})), self.method.scale

    def coefficients_of(self, tasks: Sequence[str]) -> list[float]:
        """The coefficients of some tasks, in their order, exceptions aside."""
        return [self.coefficients.get(task, 1.0) for task in tasks]

    def description(self, tasks: Sequence[str]) -> dict[str, object]:
        """The recipe as configuration: the method's class path and arguments, and all other settings of the merge.

        Args:
            tasks: The tasks, in their order.
        """
        return {
            "class_path": class_path(self.method),
            "init_args": plain_arguments(self.method),
            "coefficients": dict(zip(tasks, self.coefficients_of(tasks), strict=True)),
            "convolutions": self.convolutions,
            "non_matrix": self.non_matrix,
            "overrides": [asdict(override) for override in self.overrides],
        }

    def check(self, tasks: Sequence[str]) -> None:
        """Refuses coefficients of unknown tasks, and densities for a method or rule without one.

        Args:
            tasks: The names of all tasks.

        Raises:
            ValueError: Naming the unknown tasks and the known ones, or the override whose density cannot apply.
        """
        problems = [
            f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}"
            for name, value, allowed in (
                ("convolutions", self.convolutions, Literal["average", "matrix"]),
                ("non_matrix", self.non_matrix, Literal["average", "elect"]),
                *(
                    (f"The rule of the override {o.match!r}", o.rule, Rule)
                    for o in self.overrides
                    if o.rule is not None
                ),
            )
            if value not in get_args(allowed)
        ]
        named = {*self.coefficients, *(task for override in self.overrides for task in override.coefficients)}
        unknown = sorted(named - set(tasks))
        if unknown:
            problems.append(f"Coefficients are given for unknown tasks {', '.join(unknown)}; tasks: {', '.join(tasks)}")
        for override in self.overrides:
            if override.density is not None and override.rule in ("average", "elect", "base"):
                problems.append(
                    f"The override {override.match!r} gives a density, which the rule {override.rule} does not take"
                )
            elif override.density is not None:
                try:
                    with_density(self.inner_method, override.density)
                except ValueError as error:
                    problems.append(f"The override {override.match!r}: {error}")
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def problems(
        self, kinds: Mapping[str, Kind], shapes: Mapping[str, tuple[int, ...]], transposed: Set[str]
    ) -> list[str]:
        """Why the recipe does not fit a model's parameters, one sentence for each reason.

        Args:
            kinds: By name, the kind of every parameter that is merged.
            shapes: By name, its shape.
            transposed: Names of the matrices that are stored (in, out), whose parts are columns.
        """
        names = list(kinds)
        unmatched = [
            f"The override {o.match!r} matches no parameter that is merged, such as {', '.join(names[:3])}."
            for o in self.overrides
            if not any(fnmatchcase(name, o.match) for name in names)
        ]
        return unmatched + self.misfits(kinds, shapes, transposed)

    def misfits(
        self, kinds: Mapping[str, Kind], shapes: Mapping[str, tuple[int, ...]], transposed: Set[str]
    ) -> list[str]:
        """Why the recipe does not fit some of the parameters, one sentence for each.

        Args:
            kinds: By name, the kind of some parameters that are merged.
            shapes: By name, their shapes.
            transposed: As for `problems`.
        """
        found = []
        for name, kind in kinds.items():
            override = self.override_of(name)
            rule, shape = override.rule or self.rule(kind), shapes[name]
            if rule == "method" and not self.inner_method.elementwise and len(shape) < 2:
                method = type(self.inner_method).__name__
                found.append(f"{name} has shape {shape}, but {method} merges matrices: give it rule average or elect.")
            matrix = shape[1:] if kind == "experts" else shape
            if override.split is None:
                continue
            if problem := _split_problem(override.split, matrix, "columns" if name in transposed else "rows"):
                found.append(f"{name} of shape {shape} cannot be split: {problem}.")
        return found

    def misfits_of_factors(self, kinds: Mapping[str, Kind], tasks: Sequence[str]) -> list[str]:
        """Why merged deltas would not be low-rank where all tasks' are, one sentence for each reason.

        Args:
            kinds: By name, the kind of the parameters that are merged.
            tasks: The tasks.
        """
        reasons: dict[str, str] = {}
        for name, kind in kinds.items():
            treatment = self.treatment(name, kind, tasks)
            if treatment.split is not None:
                reasons.setdefault("split", f"an override splits {name}")
            elif treatment.method is not None and not treatment.method.supports_low_rank:
                method = treatment.method
                reasons.setdefault(type(method).__name__, f"with {type(method).__name__}, {method.not_low_rank}")
        return list(reasons.values())


def class_path(method: Method) -> str:
    """The path that imports a method's class: ``lightning_drm.<Name>`` for those of this package.

    Args:
        method: The method, of this package or a user's own.

    Example:
        >>> class_path(DRM())
        'lightning_drm.DRM'
    """
    own = type(method)
    if getattr(merging, own.__name__, None) is own:  # lightning_drm exports what its room `merging` does
        return f"lightning_drm.{own.__name__}"
    return f"{own.__module__}.{own.__qualname__}"


def plain_arguments(method: Method) -> dict[str, object]:
    """A method's arguments as configuration: a method among them as its class path and arguments.

    Args:
        method: The method.

    Example:
        >>> plain_arguments(merging.SVC(TaskArithmetic(0.3)))
        {'method': {'class_path': 'lightning_drm.TaskArithmetic', 'init_args': {'scale': 0.3}}, 'alpha': None}
    """
    return {name: plain_value(value) for name, value in method.hyperparameters().items()}


def plain_value(value: object) -> object:
    """A value as configuration: a method as its class path and arguments, all else as it is."""
    if not isinstance(value, Method):
        return value
    return {"class_path": class_path(value), "init_args": plain_arguments(value)}


def with_density(method: Method, density: float) -> Method:
    """The method with another density.

    Args:
        method: The method.
        density: The fraction to keep.

    Raises:
        ValueError: If the method has no density, or it is out of range.
    """
    arguments = method.hyperparameters()
    if "density" not in arguments:
        raise ValueError(f"{type(method).__name__} has no density")
    return type(method)(**{**arguments, "density": density})


def split_sizes(split: Split, length: int) -> list[int]:
    """The sizes of the parts of an axis."""
    return list(split) if isinstance(split, list) else [length // split] * split


def _split_problem(split: Split, shape: tuple[int, ...], of: Literal["rows", "columns"]) -> str | None:
    if len(shape) != 2:
        return "it is not a matrix"
    length = shape[("rows", "columns").index(of)]
    if isinstance(split, int):
        fits = split > 0 and length % split == 0
        return None if fits else f"its {length} {of} do not divide into {split} equal parts"
    if min(split, default=0) < 1:
        return f"every part takes at least 1 of its {of}, but the parts are {split}"
    return None if sum(split) == length else f"it has {length} {of}, but the parts add up to {sum(split)}"
