r"""Merged weights as a function of their coefficients, for methods that are linear in these.

With a linear method, the merged delta of parameter l is a sum of parts, one for each task:

.. math:: \theta_l = \theta_{0, l} + \sum_t \lambda_{t, l} C_{t, l}

1. :math:`C_{t, l}` is what the method makes of all deltas where task t has the coefficient 1 and all others 0. Of task
   arithmetic, these are the deltas, as in AdaMerging (arXiv 2310.02575). Of TIES, they are trimmed deltas without
   entries that lost the vote, as in AdaMerging++, here divided by the number of tasks that are left. Of DRM, they are
   what the joint basis leaves of a task. No merge has to be differentiated.
2. λ is one number for each task, or one for each task and parameter tensor: what the paper calls layer-wise.
3. A recipe with these coefficients merges to the same weights, as an override can give a parameter its own.

Cost: the base and N dense parts are in memory, N + 1 models, as in the paper's code; low-rank deltas become dense. A
step forms all weights once, 2 N operations for each, whatever the number of batches that go through them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_drm.deltas import Kind
from lightning_drm.fusion import Override, Recipe

DECIMALS = 6
"""Of a coefficient in a recipe: far below what a step of the search changes."""


class Parts(nn.Module):
    """Merged weights, differentiable in their coefficients.

    Args:
        parts: By parameter's name, what each of N tasks adds with the coefficient 1: shape ``(N, …)``.
        start: By parameter's name, the N coefficients to begin with.
        by_parameter: Whether each parameter has coefficients of its own; otherwise all have those of the first.

    Attributes:
        names: The parameters' names.
        coefficients: λ of shape (parameters or 1, N).

    Example:
        >>> parts = Parts({"bias": torch.tensor([[1.0, 0.0], [2.0, 3.0]])}, {"bias": [0.5, 1.0]}, by_parameter=True)
        >>> parts({"bias": torch.zeros(2)})["bias"].tolist()
        [2.5, 3.0]
    """

    def __init__(
        self, parts: Mapping[str, Tensor], start: Mapping[str, Sequence[float]], *, by_parameter: bool
    ) -> None:
        super().__init__()
        self.names = list(parts)
        first = parts[self.names[0]]
        rows = [start[name] for name in (self.names if by_parameter else self.names[:1])]
        self.coefficients = nn.Parameter(torch.tensor(rows, dtype=first.dtype, device=first.device))
        for place, part in enumerate(parts.values()):
            self.register_buffer(f"part_{place}", part, persistent=False)  # names of buffers take no dots

    @override
    def forward(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged weights by name, in the base's precision.

        Args:
            base: The base's weights by name.
        """
        return {name: self._weight(place, base[name]) for place, name in enumerate(self.names)}

    def _weight(self, place: int, base: Tensor) -> Tensor:
        part = self.get_buffer(f"part_{place}")
        row = self.coefficients[min(place, len(self.coefficients) - 1)]
        with torch.autocast(part.device.type, enabled=False):  # it would round the parts
            delta = torch.mv(part.reshape(len(part), -1).t(), row).view(base.shape)
        return (base.to(part.dtype) + delta).to(base.dtype)


def recipes_of_parts(recipe: Recipe, tasks: Sequence[str]) -> list[Recipe]:
    """The recipes that make the parts of each task: its coefficient is 1, the others 0, and so is the scale 1.

    Args:
        recipe: The recipe, of a linear method.
        tasks: The tasks.
    """
    unit, _ = recipe.at_unit_scale()
    alike = replace(unit, overrides=[replace(o, coefficients={}) for o in unit.overrides])
    return [replace(alike, coefficients={t: float(t == task) for t in tasks}) for task in tasks]


def stacked(models: Sequence[dict[str, Tensor]], order: Iterable[str]) -> dict[str, Tensor]:
    """The parts by parameter's name, each of shape ``(N, …)``; without parameters to which no task adds anything.

    Args:
        models: What the recipes of `recipes_of_parts` merged to. Each parameter is taken out of them, so that no more
            than one is in memory twice.
        order: Names of parameters, in the order that is wanted; those that were not merged are left out.
    """
    found = {}
    for name in [name for name in order if name in models[0]]:
        part = torch.stack([model.pop(name) for model in models])
        if part.any():
            found[name] = part
    return found


def configured_coefficients(recipe: Recipe, kinds: Mapping[str, Kind], tasks: Sequence[str]) -> dict[str, list[float]]:
    """By parameter, the coefficients with which its parts make what a recipe merges.

    Args:
        recipe: The recipe.
        kinds: By name, what each parameter is to its layer.
        tasks: The tasks.

    Example:
        >>> from lightning_drm import TaskArithmetic
        >>> configured_coefficients(Recipe(TaskArithmetic(0.5), {"a": 3.0}), {"bias": "other"}, ["a", "b"])
        {'bias': [1.5, 0.5]}
    """
    _, scale = recipe.at_unit_scale()
    return {
        name: [scale * value for value in recipe.treatment(name, kind, tasks).coefficients]
        for name, kind in kinds.items()
    }


def recipe_with(recipe: Recipe, coefficients: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> Recipe:
    """A recipe with other coefficients, which its overrides hold where parameters differ.

    Args:
        recipe: The recipe.
        coefficients: By parameter's name, one for each task.
        tasks: The tasks.

    Returns:
        A recipe of scale 1. Parameters that are not named, such as statistics of batch norms, have the mean of those
        that are.

    Example:
        >>> from lightning_drm import TaskArithmetic
        >>> found = recipe_with(Recipe(TaskArithmetic(0.4)), {"w": [0.1, 0.2], "b": [0.3, 0.2]}, ["x", "y"])
        >>> found.coefficients, [(o.match, o.coefficients) for o in found.overrides]
        ({'x': 0.2, 'y': 0.2}, [('w', {'x': 0.1, 'y': 0.2}), ('b', {'x': 0.3, 'y': 0.2})])
    """
    unit, _ = recipe.at_unit_scale()
    rounded = {name: [round(float(value), DECIMALS) for value in row] for name, row in coefficients.items()}
    means = [round(sum(column) / len(rounded), DECIMALS) for column in zip(*rounded.values(), strict=True)]
    of_all = dict(zip(tasks, means, strict=True))
    kept = [replace(o, coefficients={}) for o in unit.overrides]
    if all(row == means for row in rounded.values()):
        return replace(unit, coefficients=of_all, overrides=kept)
    own: list[Override] = [
        replace(unit.override_of(name), match=escape(name), coefficients=dict(zip(tasks, row, strict=True)))
        for name, row in rounded.items()
    ]
    return replace(unit, coefficients=of_all, overrides=[*own, *kept])
