"""The matrices that studies look at: those that a matrix method merges, one of all tasks at a time."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation import Deltas
from lightning_drm.fusion import Recipe
from lightning_drm.fusion.blocks import in_depth
from lightning_drm.fusion.parameter import experts
from lightning_drm.fusion.task_deltas import TaskDeltas
from lightning_drm.merging import DRM, Delta, LowRank


class Matrices:
    """The deltas of linear layers, of experts and, if the recipe merges them as matrices, of convolutions.

    Overrides of the recipe do not count here: every matrix is studied as a whole, under the method's own settings.

    Args:
        vectors: By task, its task vector.
        recipe: The recipe.
        pattern: A parameter's name, or a shell pattern for several; all if left out.

    Attributes:
        tasks: The tasks' names, in the order of the deltas.
        names: The parameters' names, in the order of the model's depth.

    Example:
        >>> vector = TaskVector("a", {"0.weight": torch.eye(2)}, {"0.weight": "matrix"}, {}, {})
        >>> [(name, deltas) for name, deltas in Matrices({"a": vector}, Recipe())]
        [('0.weight', [tensor([[1., 0.],
                [0., 1.]])])]
    """

    def __init__(self, vectors: Mapping[str, TaskVector], recipe: Recipe, pattern: str | None = None) -> None:
        self._deltas = TaskDeltas(list(vectors.values()), torch.device("cpu"))
        self.tasks = self._deltas.tasks
        kinds = {"matrix", "experts", *(["convolution"] if recipe.convolutions == "matrix" else [])}
        found = in_depth(name for name, kind in self._deltas.kinds.items() if kind in kinds)
        self.names = found if pattern is None else [name for name in found if fnmatchcase(name, pattern)]
        self._all, self._pattern = found, pattern

    def __iter__(self) -> Iterator[tuple[str, list[Delta]]]:
        """Each matrix' name, and its delta from every task; zeros from a task that did not train it."""
        for name, deltas in zip(self.names, self._deltas.stream((name, None) for name in self.names), strict=True):
            yield from _as_matrices(name, deltas)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.names)

    def read(self, name: str) -> list[tuple[str, list[Delta]]]:
        """The matrices of one parameter, as iteration gives them.

        Args:
            name: The parameter's name.
        """
        return list(_as_matrices(name, self._deltas.read(name)))

    def problems(self) -> list[str]:
        """Why there is nothing to study, if so."""
        if not self._all:
            return ["the tasks have trained no matrices."]
        if not self.names:
            return [f"no matrix that is merged matches {self._pattern!r}; there are {', '.join(self._all[:3])} …"]
        return []


def matrix_of(deltas: Deltas, name: str) -> Tensor:
    """One of the matrices that `Matrices` names, from dense deltas by parameter name.

    Args:
        deltas: The deltas.
        name: The matrix' name: ``weight``, or ``weight[2]`` for an expert's.

    Example:
        >>> matrix_of({"up": torch.tensor([[[1.0]], [[2.0]]])}, "up[1]")
        tensor([[2.]])
    """
    parameter, _, index = name.partition("[")
    delta = deltas[parameter]
    return delta[int(index.removesuffix("]"))] if index else delta.flatten(1)


def drm_of(recipe: Recipe) -> DRM:
    """The recipe's method if it is DRM; else DRM with its defaults, whose joint basis is studied then.

    Args:
        recipe: The recipe.
    """
    return recipe.method if isinstance(recipe.method, DRM) else DRM()


def _as_matrices(name: str, deltas: list[Delta]) -> Iterator[tuple[str, list[Delta]]]:
    if len(deltas[0].shape) == 3:
        for index, of_expert in enumerate(experts(deltas)):
            yield f"{name}[{index}]", of_expert
    else:
        yield name, [delta if isinstance(delta, LowRank) else delta.flatten(1) for delta in deltas]
