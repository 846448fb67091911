"""What is searched: methods, and for each of their hyper-parameters the values to try.

The default grids are the paper's (arXiv 2505.23117, appendix H.5); the last row is this package's own, around the
default:

| method | ``scale``, the λ of all tasks | ``density``, the rate that is kept |
|---|---|---|
| ``TaskArithmetic`` | 0.1, 0.2, … 1.0 | |
| ``TIES``, ``DARETIES``, ``DRM`` | 0.8, 0.9, … 1.5 | 0.1, 0.2, … 1.0 |
| ``IsoC``, ``IsoCTS``, ``TSVM`` | 0.5, 0.6, … 2.0 | |

A merged delta is linear in ``scale``, so λ is applied to what is merged already. A `Family` is all settings of a method
that differ in numbers only: DRM-H and DRM-V are two. It has a study and a picture of its own.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Literal, TypeAlias

from lightning_drm import merging
from lightning_drm.fusion import Recipe, class_path, method_title
from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, Method, TaskArithmetic

Value: TypeAlias = bool | int | float | str
Grid: TypeAlias = Mapping[str, Mapping[str, Sequence[Value]]]
"""By method, and by hyper-parameter, the values to try."""

Params: TypeAlias = Mapping[str, float]
"""By name, the numbers of one setting of a family."""

Coefficients = Literal["one", "each"]

ALL: tuple[type[Method], ...] = (DRM, TIES, DARETIES, TaskArithmetic, Average, IsoC, IsoCTS, TSVM)

_COEFFICIENT = "coefficients."


def _steps(first: int, last: int) -> list[Value]:
    return [tenths / 10 for tenths in range(first, last + 1)]


_DENSITIES = _steps(1, 10)
_SCALES: Mapping[type[Method], list[Value]] = {
    TaskArithmetic: _steps(1, 10),
    **dict.fromkeys((IsoC, IsoCTS, TSVM), _steps(5, 20)),
}
_PAPERS_SCALES = _steps(8, 15)


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
        method = self.recipe.method
        defaults = type(method)(**{**method.hyperparameters(), **_defaults(type(method), self.numbers)})
        words = method_title(defaults).split(", ")
        return ", ".join(word for word in words if word.rpartition(" ")[0] not in self.numbers)

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
        method, own = self.recipe.method, {name: v for name, v in params.items() if not name.startswith(_COEFFICIENT)}
        tasks = {name.removeprefix(_COEFFICIENT): v for name, v in params.items() if name.startswith(_COEFFICIENT)}
        return replace(
            self.recipe,
            method=type(method)(**{**method.hyperparameters(), **own}),
            coefficients={**self.recipe.coefficients, **tasks},
        )


def setting_title(recipe: Recipe) -> str:
    """A setting in words: the method's, and the coefficients that are not 1.

    Args:
        recipe: The setting.

    Example:
        >>> setting_title(Recipe(DRM(scale=1.2), {"topic": 0.5}))
        'DRM, horizontal, density 0.2, scale 1.2, coefficient of topic 0.5'
    """
    coefficients = [f"coefficient of {task} {value:.3g}" for task, value in recipe.coefficients.items() if value != 1.0]
    return ", ".join([method_title(recipe.method), *coefficients])


def search_space(
    recipe: Recipe,
    tasks: Sequence[str],
    *,
    methods: str | Sequence[str] | None = None,
    grid: Grid | None = None,
    coefficients: Coefficients = "one",
) -> list[Family]:
    """The families to search.

    Args:
        recipe: The configured recipe. Whatever is not searched stays as it is there; a method of another class starts
            from its own defaults.
        tasks: The tasks.
        methods: Names of methods, or import paths, or ``"all"``; those of the grid if left out, and without a grid the
            configured one, in its direction if it is DRM.
        grid: Takes the place of the default grids of the methods that it names.
        coefficients: ``"one"`` searches one λ for all tasks, the method's ``scale``; ``"each"`` one for each task,
            among the same values.

    Raises:
        ValueError: Naming all methods, hyper-parameters and values that cannot be.

    Example:
        >>> (family,) = search_space(Recipe(DRM("vertical")), ["topic", "mood"])
        >>> family.title, len(family.points), family.points[1]
        ('DRM, vertical', 80, {'density': 0.1, 'scale': 0.9})
    """
    problems: list[str] = []
    families = []
    for kind, choices in _grids(recipe, methods, grid, problems).items():
        start = recipe.method.hyperparameters() if type(recipe.method) is kind else {}
        if found := _problems(kind, start, choices):
            problems += found
            continue
        families += _families(replace(recipe, method=_made(kind, start, choices)), choices, tasks, coefficients)
    for family in families:
        problems += _misfits(family, tasks)
    if problems:
        raise ValueError(" ".join(dict.fromkeys(problems)))
    return families


def default_grid(kind: type[Method], *, directions: bool = False) -> dict[str, list[Value]]:
    """The default grid of a method.

    Args:
        kind: The method.
        directions: Whether DRM is searched in both.

    Example:
        >>> default_grid(TaskArithmetic)
        {'scale': [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]}
    """
    names = inspect.signature(kind).parameters
    grid: dict[str, list[Value]] = {"direction": ["horizontal", "vertical"]} if kind is DRM and directions else {}
    if "density" in names:
        grid["density"] = _DENSITIES
    if "scale" in names:
        grid["scale"] = _scales(kind)
    return grid


def _scales(kind: type[Method]) -> list[Value]:
    return _SCALES.get(kind, _PAPERS_SCALES)


def _grids(
    recipe: Recipe, methods: str | Sequence[str] | None, grid: Grid | None, problems: list[str]
) -> dict[type[Method], Mapping[str, Sequence[Value]]]:
    """By method, the values to try."""
    own = {kind: values for name, values in (grid or {}).items() if (kind := _kind(name, problems)) is not None}
    if methods is None:
        if grid is None:
            return {type(recipe.method): default_grid(type(recipe.method))}
        if not grid:
            problems.append("The grid names no method.")
        return own
    if methods == "all":
        kinds: Iterable[type[Method] | None] = ALL
    else:
        names = [methods] if isinstance(methods, str) else methods
        kinds = [_kind(name, problems) for name in names]
        if not names:
            problems.append("There are no methods to search.")
    chosen = dict.fromkeys(kind for kind in kinds if kind is not None)
    for kind in own.keys() - chosen.keys():
        problems.append(f"The grid has {kind.__name__}, which is not among the methods to search.")
    return {kind: own.get(kind, default_grid(kind, directions=True)) for kind in chosen}


def _kind(name: str, problems: list[str]) -> type[Method] | None:
    """The class of a method's name."""
    module, _, short = name.removeprefix("lightning_drm.").rpartition(".")
    try:
        found = getattr(import_module(module) if module else merging, short, None)
    except ImportError:
        found = None
    if isinstance(found, type) and issubclass(found, Method) and not inspect.isabstract(found):
        return found
    known = ", ".join(kind.__name__ for kind in ALL)
    problems.append(f"There is no method {name!r}; the methods are {known}, and one of your own by its import path.")
    return None


def _problems(kind: type[Method], start: Mapping[str, Value], choices: Mapping[str, Sequence[Value]]) -> list[str]:
    """Why values cannot be tried."""
    name, known = kind.__name__, inspect.signature(kind).parameters
    problems = []
    for parameter, values in choices.items():
        if parameter not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            problems.append(f"{name} has no hyper-parameter {parameter!r}; {has}.")
        elif not values:
            problems.append(f"The grid of {name} gives no values for {parameter}.")
    if problems:
        return problems
    if lacking := [p.name for p in known.values() if p.default is p.empty and p.name not in {**start, **choices}]:
        return [f"{name} needs values for {', '.join(lacking)} in the grid."]
    first = _values_of(kind, start, choices)
    for parameter, values in choices.items():
        for value in values:
            if not _fits(value, known[parameter].default):
                problems.append(f"{name}: {parameter} cannot be {value!r}.")
                continue
            try:
                kind(**{**first, parameter: value})
            except ValueError as error:
                problems.append(f"{str(error).removesuffix('.')}.")
    return problems


def _fits(value: Value, default: object) -> bool:
    """Whether a value is of the kind that a default is of."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (isinstance(default, bool) or default is inspect.Parameter.empty)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default)) or not isinstance(default, int | str)


def _values_of(
    kind: type[Method], start: Mapping[str, Value], choices: Mapping[str, Sequence[Value]]
) -> dict[str, Value]:
    """Arguments to begin with: those that are configured, and values of the grid for those without a default."""
    known = inspect.signature(kind).parameters
    needed = {p.name: choices[p.name][0] for p in known.values() if p.default is p.empty and p.name in choices}
    return {**needed, **start}


def _made(kind: type[Method], start: Mapping[str, Value], choices: Mapping[str, Sequence[Value]]) -> Method:
    made: Method = kind(**_values_of(kind, start, choices))
    return made


def _families(
    recipe: Recipe, choices: Mapping[str, Sequence[Value]], tasks: Sequence[str], coefficients: Coefficients
) -> list[Family]:
    """One family for each combination of what is not a number."""
    method = recipe.method
    current = method.hyperparameters()
    numbers: dict[str, tuple[float, ...]] = {}
    others: dict[str, list[Value]] = {}
    for name, values in sorted(choices.items(), key=lambda item: item[0] == "scale"):
        if isinstance(current[name], float):
            numbers[name] = tuple(dict.fromkeys(float(value) for value in values))
        elif isinstance(current[name], int) and not isinstance(current[name], bool):
            numbers[name] = tuple(dict.fromkeys(int(value) for value in values))
        else:
            others[name] = list(dict.fromkeys(values))
    if coefficients == "each":
        lambdas = numbers.pop("scale", tuple(float(value) for value in _scales(type(method))))
        current |= {"scale": 1.0} if "scale" in current else {}
        numbers |= {f"{_COEFFICIENT}{task}": lambdas for task in tasks}
    return [
        Family(replace(recipe, method=type(method)(**{**current, **dict(zip(others, values, strict=True))})), numbers)
        for values in product(*others.values())
    ]


def _misfits(family: Family, tasks: Sequence[str]) -> list[str]:
    """Why settings of a family cannot be, though each of their values can."""
    problems = []
    own = [name for name in family.numbers if not name.startswith(_COEFFICIENT)]
    for values in product(*(family.numbers[name] for name in own)):
        try:
            setting = family.setting(dict(zip(own, values, strict=True)))
        except ValueError as error:
            problems.append(f"{str(error).removesuffix('.')}.")
            continue
        try:
            setting.check(tasks)
        except ValueError as error:
            problems.append(f"{class_path(setting.method)}: {error}")
    return problems


def _defaults(kind: type[Method], names: Iterable[str]) -> dict[str, object]:
    known = inspect.signature(kind).parameters
    return {n: known[n].default for n in names if n in known and known[n].default is not inspect.Parameter.empty}
