"""Which values of which methods' hyper-parameters are tried.

The first two rows are the paper's grids (arXiv 2505.23117, appendix H.5). DC-Merge's is its authors', up to their 3.0
in wider steps, LiNeS' theirs. The others are this package's own, around the defaults:

| method | ``scale``, the λ of all tasks | other |
|---|---|---|
| ``TaskArithmetic`` | 0.1, 0.2, … 1.0 | |
| ``TIES``, ``DARETIES``, ``DRM`` | 0.8, 0.9, … 1.5 | ``density``: 0.1, 0.2, … 1.0 |
| ``IsoC``, ``IsoCTS``, ``TSVM`` | 0.5, 0.6, … 2.0 | |
| ``WUDI`` | 0.5, 0.6, … 2.0 | ``ridge``: 0.01, 0.03, 0.1, 0.3, 1.0 |
| ``DCMerge`` | 0.2, 0.4, … 3.0 | |
| ``STAR`` | 0.5, 0.6, … 2.0 | ``eta``: 20, 40, 60, 80 |
| ``KnOTS`` | 0.5, 0.6, … 1.5 | ``density``: 0.1, 0.2, … 1.0 |
| ``RegMean`` | | ``alpha``: 0.1, 0.5, 0.7, 0.9, 0.95, 1.0 |
| ``SVC`` | | ``alpha``: 0.1, 0.25, 0.5, 1.0 |
| ``LiNeS`` | | ``beta``: 0.1, 0.2, … 1.0 |

A wrapper is searched by its own grid. A grid of the user's may name what is inside, too, as in ``method.density``.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TypeAlias

from lightning_drm import merging
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import problem_of_statistics
from lightning_drm.merging import (
    DRM,
    METHODS,
    STAR,
    SVC,
    TSVM,
    WUDI,
    DCMerge,
    IsoC,
    IsoCTS,
    KnOTS,
    LiNeS,
    Method,
    RegMean,
    TaskArithmetic,
)
from lightning_drm.tuning.nesting import Nesting

Value: TypeAlias = bool | int | float | str
Grid: TypeAlias = Mapping[str, Mapping[str, Sequence[Value]]]
"""By method, such as "SVC of DRM", and by hyper-parameter, such as ``method.density``, the values to try."""


def _steps(first: int, last: int) -> list[Value]:
    return [tenths / 10 for tenths in range(first, last + 1)]


_DENSITIES = _steps(1, 10)
_SCALES: Mapping[type[Method], list[Value]] = {
    TaskArithmetic: _steps(1, 10),
    **dict.fromkeys((IsoC, IsoCTS, TSVM, WUDI, STAR), _steps(5, 20)),
    DCMerge: [fifths / 5 for fifths in range(1, 16)],
    KnOTS: _steps(5, 15),
}
_OTHERS: Mapping[type[Method], dict[str, list[Value]]] = {
    WUDI: {"ridge": [0.01, 0.03, 0.1, 0.3, 1.0]},
    STAR: {"eta": [20.0, 40.0, 60.0, 80.0]},
    RegMean: {"alpha": [0.1, 0.5, 0.7, 0.9, 0.95, 1.0]},
    SVC: {"alpha": [0.1, 0.25, 0.5, 1.0]},
    LiNeS: {"beta": _steps(1, 10)},
    DCMerge: {},  # its density is a constant of the authors' code
}
_PAPERS_SCALES = _steps(8, 15)


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
    grid |= _OTHERS.get(kind, {"density": _DENSITIES} if "density" in names else {})
    if "scale" in names:
        grid["scale"] = default_scales(kind)
    return grid


def default_scales(kind: type[Method]) -> list[Value]:
    """The values of λ that are tried of a method.

    Args:
        kind: The method.
    """
    return _SCALES.get(kind, _PAPERS_SCALES)


def chosen_grids(
    configured: Method,
    methods: Sequence[str] | None,
    grid: Grid | None,
    problems: list[str],
    vectors: Sequence[TaskVector] = (),
) -> dict[Nesting, Mapping[str, Sequence[Value]]]:
    """By method, the values to try.

    Args:
        configured: The method that is searched if nothing is said. What it wraps need not be named again.
        methods: Names of methods, or import paths, or ``["all"]``; those of the grid if left out.
        grid: Takes the place of the default grids of the methods that it names.
        problems: Where a sentence is added for whatever cannot be.
        vectors: What is merged. A method that needs statistics which these do not have is not among ``["all"]``.
    """
    known, every = Nesting.of(configured), list(methods or []) == ["all"]
    if methods and "all" in methods and not every:
        problems.append("'all' stands for every method: leave out the others.")
        methods = [name for name in methods if name != "all"]
    names = [*(grid or {}), *([] if every else methods or [])]
    named = {name: _nesting(name, known, problems) for name in names}
    own: dict[Nesting, Mapping[str, Sequence[Value]]] = {}
    for name, values in (grid or {}).items():
        if (found := named[name]) is None:
            continue
        if found in own:
            problems.append(f"The grid has {found.name} twice, the second time as {name!r}.")
        own[found] = values
    if methods is None:
        if grid is None:
            return {known: default_grid(known.outermost)}
        if not grid:
            problems.append("The grid names no method.")
        return own
    if not methods:
        problems.append("There are no methods to search.")
    if every:
        chosen = dict.fromkeys(Nesting((kind,)) for kind in METHODS if problem_of_statistics(kind(), vectors) is None)
    else:
        chosen = dict.fromkeys(found for name in methods if (found := named[name]) is not None)
    problems += [
        f"The grid has {one.name}, which is not among the methods to search." for one in own if one not in chosen
    ]
    return {one: own.get(one, default_grid(one.outermost, directions=True)) for one in chosen}


def _nesting(name: str, configured: Nesting, problems: list[str]) -> Nesting | None:
    """What a name means; the configured method where it names its class."""
    words = [word.strip() for word in name.split(" of ")]
    classes = tuple(kind for word in words if (kind := _kind(word, problems)) is not None)
    if len(classes) != len(words):
        return None
    if classes == configured.classes[:1]:
        return configured
    found = Nesting(classes)
    if (problem := found.problem) is not None:
        problems.append(problem)
        return None
    return found


def _kind(name: str, problems: list[str]) -> type[Method] | None:
    """The class of a method's name."""
    module, _, short = name.removeprefix("lightning_drm.").rpartition(".")
    try:
        found = getattr(import_module(module) if module else merging, short, None)
    except ImportError:
        found = None
    if isinstance(found, type) and issubclass(found, Method) and not inspect.isabstract(found):
        return found
    known = ", ".join(kind.__name__ for kind in METHODS)
    problems.append(
        f"There is no method {name!r}; the methods are {known}, SVC and LiNeS around one, as in 'SVC of DRM', and one "
        "of your own by its import path."
    )
    return None
