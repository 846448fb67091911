"""What is searched: families of settings, each of one method.

A merged delta is linear in ``scale``, so λ is applied to what is merged already. A `Family` is all settings of a method
that differ in numbers only: DRM-H and DRM-V are two. It has a study and a picture of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from itertools import product
from typing import Literal, TypeAlias

from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Recipe, method_title, problem_of_statistics
from lightning_drm.merging import METHODS
from lightning_drm.tuning.grids import Grid, Value, chosen_grids, default_scales
from lightning_drm.tuning.nesting import Nesting, arguments_of, with_arguments

Params: TypeAlias = Mapping[str, float]
"""By name, the numbers of one setting of a family."""

Coefficients = Literal["one", "each"]

_COEFFICIENT = "coefficients."


@dataclass(frozen=True)
class Family:
    """Settings of one method that differ in numbers only.

    Attributes:
        recipe: The recipe, with everything that all of them share.
        numbers: By hyper-parameter, or ``coefficients.<task>``, the values to try. ``scale`` comes last.
    """

    recipe: Recipe
    numbers: Mapping[str, tuple[float, ...]]

    @property
    def title(self) -> str:
        """What all of its settings share, as in "DRM, vertical"."""
        return method_title(self.recipe.method, self.numbers)

    @property
    def points(self) -> list[Params]:
        """The grid, in an order in which settings that share work follow each other: ``scale`` changes first."""
        return [dict(zip(self.numbers, values, strict=True)) for values in product(*self.numbers.values())]

    def setting(self, params: Params) -> Recipe:
        """The recipe of one setting.

        Args:
            params: Its numbers.

        Raises:
            ValueError: If one is out of range.
        """
        own = {name: v for name, v in params.items() if not name.startswith(_COEFFICIENT)}
        tasks = {name.removeprefix(_COEFFICIENT): v for name, v in params.items() if name.startswith(_COEFFICIENT)}
        return replace(
            self.recipe,
            method=with_arguments(self.recipe.method, own),
            coefficients={**self.recipe.coefficients, **tasks},
        )


def setting_title(recipe: Recipe) -> str:
    """A setting in words: the method's, the coefficients that are not 1, and how many overrides have others.

    Args:
        recipe: The setting.

    Example:
        >>> from lightning_drm import DRM
        >>> setting_title(Recipe(DRM(scale=1.2), {"topic": 0.5}))
        'DRM, horizontal, density 0.2, scale 1.2, coefficient of topic 0.5'
    """
    coefficients = [f"coefficient of {task} {value:.3g}" for task, value in recipe.coefficients.items() if value != 1.0]
    own = sum(bool(override.coefficients) for override in recipe.overrides)
    overrides = [f"{own} override{'s' if own > 1 else ''} with others"] if own else []
    return ", ".join([method_title(recipe.method), *coefficients, *overrides])


def search_space(
    recipe: Recipe,
    tasks: Sequence[str],
    vectors: Sequence[TaskVector] = (),
    *,
    methods: Sequence[str] | None = None,
    grid: Grid | None = None,
    coefficients: Coefficients = "one",
) -> list[Family]:
    """The families to search.

    Args:
        recipe: The configured recipe. Whatever is not searched stays as it is there; a method of another class starts
            from its own defaults.
        tasks: The tasks.
        vectors: Their vectors, which may lack statistics that a method needs.
        methods: Names of methods, or import paths, or ``["all"]``; of wrappers, "SVC of DRM". If left out, those of the
            grid, and without a grid the configured one, in its direction if it is DRM.
        grid: Takes the place of the default grids of the methods that it names.
        coefficients: ``"one"`` searches one λ for all tasks, the method's ``scale``; ``"each"`` one for each task,
            among the same values, with ``scale``, or the innermost one of several methods, at 1.

    Raises:
        ValueError: Naming all methods, hyper-parameters and values that cannot be.

    Example:
        >>> from lightning_drm import DRM
        >>> (family,) = search_space(Recipe(DRM("vertical")), ["topic", "mood"])
        >>> family.title, len(family.points), family.points[1]
        ('DRM, vertical', 80, {'density': 0.1, 'scale': 0.9})
        >>> grid = {"SVC of TIES": {"alpha": [0.5, 1.0], "method.density": [0.1, 0.2]}}
        >>> (family,) = search_space(Recipe(), ["topic", "mood"], grid=grid)
        >>> family.title, family.points[2]
        ('SVC of TIES', {'alpha': 1.0, 'method.density': 0.1})
    """
    problems: list[str] = []
    families = []
    for nesting, choices in chosen_grids(recipe.method, methods, grid, problems, vectors).items():
        start = arguments_of(recipe.method) if Nesting.of(recipe.method) == nesting else {}
        if found := _problems(nesting, start, choices):
            problems += found
            continue
        method = nesting.made(_values_of(nesting, start, choices))
        families += _families(replace(recipe, method=method), choices, tasks, coefficients)
    problems += [problem for family in families for problem in _misfits(family)]
    of_statistics = (problem_of_statistics(family.recipe.method, vectors) for family in families)
    problems += [problem for problem in of_statistics if problem is not None]
    if problems:
        raise ValueError(" ".join(dict.fromkeys(problems)))
    return families


def learned_setting(recipe: Recipe, methods: Sequence[str] | None, *, by_parameter: bool) -> Recipe:
    """The recipe whose coefficients are learned.

    Args:
        recipe: The configured recipe.
        methods: The name of a method that takes the place of the configured one, with its own defaults.
        by_parameter: Whether each parameter has coefficients of its own.

    Raises:
        ValueError: If it is not one method that is linear in the coefficients, or has overrides that would be ignored.
    """
    problems: list[str] = []
    nestings = list(chosen_grids(recipe.method, methods, None, problems))
    if not problems and len(nestings) != 1:
        problems.append(
            f"Coefficients are learned for one method at a time, got {', '.join(one.name for one in nestings)}."
        )
    if not problems and not nestings[0].outermost.linear:
        linear = ", ".join(kind.__name__ for kind in METHODS if kind.linear)
        problems.append(
            f"Coefficients are learned of methods that are linear in them, which {nestings[0].name} is not: give "
            f"--methods one of {linear}."
        )
    fixed = [repr(override.match) for override in recipe.overrides if override.coefficients]
    if fixed and not by_parameter:
        problems.append(
            f"The overrides {', '.join(fixed)} have coefficients of their own, and one for each task would replace "
            "them: give --coefficients layers, or leave them out."
        )
    if problems:
        raise ValueError(" ".join(problems))
    (nesting,) = nestings
    return recipe if Nesting.of(recipe.method) == nesting else replace(recipe, method=nesting.made({}))


def _problems(nesting: Nesting, start: Mapping[str, Value], choices: Mapping[str, Sequence[Value]]) -> list[str]:
    """Why values cannot be tried."""
    name, known = nesting.name, nesting.parameters
    problems = []
    for parameter, values in choices.items():
        if parameter not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            problems.append(f"{name} has no hyper-parameter {parameter!r}; {has}.")
        elif not values:
            problems.append(f"The grid of {name} gives no values for {parameter}.")
    if problems:
        return problems
    if lacking := [n for n, p in known.items() if p.default is p.empty and n not in {**start, **choices}]:
        return [f"{name} needs values for {', '.join(lacking)} in the grid."]
    first = _values_of(nesting, start, choices)
    for parameter, values in choices.items():
        for value in values:
            if not _fits(value, known[parameter].default):
                problems.append(f"{name}: {parameter} cannot be {value!r}.")
                continue
            try:
                nesting.made({**first, parameter: value})
            except ValueError as error:
                problems.append(f"{str(error).removesuffix('.')}.")
            except TypeError:  # the default was no hint, as it is None
                problems.append(f"{name}: {parameter} cannot be {value!r}.")
    return problems


def _fits(value: Value, default: object) -> bool:
    """Whether a value is of the kind that a default is of."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (isinstance(default, bool) or default is Parameter.empty)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default)) or not isinstance(default, int)


def _values_of(
    nesting: Nesting, start: Mapping[str, Value], choices: Mapping[str, Sequence[Value]]
) -> dict[str, Value]:
    """Arguments to begin with: those that are configured, and values of the grid for those without a default."""
    needed = {n: choices[n][0] for n, p in nesting.parameters.items() if p.default is p.empty and n in choices}
    return {**needed, **start}


def _families(
    recipe: Recipe, choices: Mapping[str, Sequence[Value]], tasks: Sequence[str], coefficients: Coefficients
) -> list[Family]:
    """One family for each combination of what is not a number."""
    method = recipe.method
    current = arguments_of(method)
    numbers: dict[str, tuple[float, ...]] = {}
    others: dict[str, list[Value]] = {}
    for name, values in sorted(choices.items(), key=lambda item: item[0] == "scale"):
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            others[name] = list(dict.fromkeys(values))
        elif isinstance(current[name], float) or any(isinstance(value, float) for value in values):
            numbers[name] = tuple(dict.fromkeys(float(value) for value in values))
        else:
            numbers[name] = tuple(dict.fromkeys(int(value) for value in values))
    if coefficients == "each":
        scale = next((name for name in reversed(current) if name.rpartition(".")[2] == "scale"), None)
        kind = Nesting.of(method).classes[scale.count(".") if scale is not None else 0]  # the one that has the λ
        lambdas = tuple(float(value) for value in default_scales(kind))
        if scale is not None:
            lambdas = numbers.pop(scale, lambdas)
            current[scale] = 1.0
        numbers |= {f"{_COEFFICIENT}{task}": lambdas for task in tasks}
    return [
        Family(
            replace(recipe, method=with_arguments(method, {**current, **dict(zip(others, values, strict=True))})),
            numbers,
        )
        for values in product(*others.values())
    ]


def _misfits(family: Family) -> list[str]:
    """Why settings of a family cannot be, though each of their values can."""
    problems = []
    own = [name for name in family.numbers if not name.startswith(_COEFFICIENT)]
    for values in product(*(family.numbers[name] for name in own)):
        try:
            family.setting(dict(zip(own, values, strict=True)))
        except ValueError as error:
            problems.append(f"{str(error).removesuffix('.')}.")
    return problems
