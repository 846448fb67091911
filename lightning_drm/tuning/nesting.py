"""Methods inside methods: a wrapper such as SVC or LiNeS goes around another method, and both have hyper-parameters.

Those inside have names with a dot, ``method.density``, for their place in a configuration. The method goes by the name
that its title has, "SVC of DRM".
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Self

from lightning_drm.fusion.recipe import class_path
from lightning_drm.merging import Method

INSIDE = "method"
"""The argument by which a wrapper takes its method."""


@dataclass(frozen=True)
class Nesting:
    """The class of a method, and the classes of those inside it, from the outside in.

    Attributes:
        classes: The classes, one at least.

    Example:
        >>> from lightning_drm import SVC, TaskArithmetic
        >>> nesting = Nesting((SVC, TaskArithmetic))
        >>> nesting.name, list(nesting.parameters)
        ('SVC of TaskArithmetic', ['alpha', 'method.scale'])
        >>> nesting.made({"alpha": 0.5, "method.scale": 0.3})
        SVC(method=TaskArithmetic(scale=0.3), alpha=0.5)
    """

    classes: tuple[type[Method], ...]

    @classmethod
    def of(cls, method: Method) -> Self:
        """The nesting of a method.

        Args:
            method: The method.
        """
        return cls(tuple(type(one) for one in _inwards(method)))

    @property
    def outermost(self) -> type[Method]:
        """The class that has all others inside."""
        return self.classes[0]

    @property
    def inside(self) -> Self | None:
        """What the outermost class wraps."""
        return type(self)(self.classes[1:]) if self.classes[1:] else None

    @property
    def name(self) -> str:
        """As in "SVC of DRM"."""
        return " of ".join(kind.__name__ for kind in self.classes)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """By hyper-parameter, the argument that it is, with its default."""
        found = dict(inspect.signature(self.outermost).parameters)
        if self.inside is not None:
            del found[INSIDE]
            found |= {f"{INSIDE}.{name}": parameter for name, parameter in self.inside.parameters.items()}
        return found

    @property
    def problem(self) -> str | None:
        """Why there are no such methods; ``None`` if there are."""
        outer, *inner = self.classes
        argument = inspect.signature(outer).parameters.get(INSIDE)
        if inner and argument is None:
            return f"{outer.__name__} does not wrap another method, so {self.name!r} does not exist."
        if not inner and argument is not None and argument.default is Parameter.empty:
            return f"{outer.__name__} wraps another method: say which, as in '{outer.__name__} of DRM'."
        return self.inside.problem if self.inside is not None else None

    def made(self, arguments: Mapping[str, Any]) -> Method:
        """The method with some hyper-parameters, and its defaults for all others.

        Args:
            arguments: By hyper-parameter, its value.

        Raises:
            ValueError: If one is out of range.
        """
        own = {name: value for name, value in arguments.items() if "." not in name}
        if self.inside is not None:
            own[INSIDE] = self.inside.made(_of_inside(arguments))
        made: Method = self.outermost(**own)
        return made


def arguments_of(method: Method) -> dict[str, Any]:
    """The hyper-parameters of a method and of those inside it.

    Args:
        method: The method.

    Example:
        >>> from lightning_drm import SVC, TaskArithmetic
        >>> arguments_of(SVC(TaskArithmetic(0.3)))
        {'alpha': None, 'method.scale': 0.3}
    """
    found = method.hyperparameters()
    if isinstance(inside := found.get(INSIDE), Method):
        del found[INSIDE]
        found |= {f"{INSIDE}.{name}": value for name, value in arguments_of(inside).items()}
    return found


def with_arguments(method: Method, arguments: Mapping[str, Any]) -> Method:
    """The method with some other hyper-parameters.

    Args:
        method: The method.
        arguments: By hyper-parameter, its value.

    Raises:
        ValueError: If one is out of range.
    """
    return Nesting.of(method).made({**arguments_of(method), **arguments})


def full_name(method: Method) -> str:
    """The import path of a method, and of those inside it.

    Args:
        method: The method.

    Example:
        >>> from lightning_drm import SVC, TaskArithmetic
        >>> full_name(SVC(TaskArithmetic()))
        'lightning_drm.SVC of lightning_drm.TaskArithmetic'
    """
    return " of ".join(class_path(one) for one in _inwards(method))


def _inwards(method: Method) -> list[Method]:
    inside = method.hyperparameters().get(INSIDE)
    return [method, *(_inwards(inside) if isinstance(inside, Method) else [])]


def _of_inside(arguments: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{INSIDE}."
    return {name.removeprefix(start): value for name, value in arguments.items() if name.startswith(start)}
