"""Laying a recipe over task vectors: one parameter of all tasks at a time, its merged delta out.

Deltas are read when their turn comes and dropped after, so at no time are more than one parameter's deltas on the
device. Tasks are taken in the order of their names, whatever order they came in, so that rounding, too, is the same.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_drm.deltas import Kind, TaskVector, describe_difference
from lightning_drm.engine.recipe import Recipe
from lightning_drm.merging import Average, Delta, LowRank, Method


class Fusion:
    """The merged deltas of some task vectors under a recipe.

    Args:
        recipe: What to do.
        vectors: The task vectors, at least one.
        device: Where to compute; deltas that are elsewhere are brought there one parameter at a time.

    Raises:
        ValueError: If task vectors come from different bases, disagree on a parameter's shape or kind, or the recipe
            names unknown tasks.
    """

    def __init__(self, recipe: Recipe, vectors: Sequence[TaskVector], device: torch.device | str = "cpu") -> None:
        recipe.check([vector.task for vector in vectors])
        self.recipe = recipe
        self.vectors = sorted(vectors, key=lambda vector: vector.task)
        self.device = torch.device(device)
        self.kinds = _agreed_kinds(self.vectors)

    def __len__(self) -> int:
        """How many parameters have a delta in some task."""
        return len(self.kinds)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and merged delta of each parameter, in the parameter's own shape, on the device."""
        method = self.recipe.method
        coefficients = self.recipe.coefficients_of([vector.task for vector in self.vectors])
        by_method = [name for name, kind in self.kinds.items() if self.recipe.rule(kind) == "method"]
        method = method.calibrate(lambda: map(self._deltas, by_method))
        for name, kind in self.kinds.items():
            deltas = self._deltas(name)
            if self.recipe.rule(kind) == "method":
                keyed = method.keyed([f"{vector.task}/{name}" for vector in self.vectors])
                yield name, _merge_in_shape(keyed, deltas, coefficients)
            else:
                yield name, Average().merge(deltas, coefficients) * method.scale

    def _deltas(self, name: str) -> list[Delta]:
        deltas = [vector.deltas.get(name) for vector in self.vectors]
        present = [delta for delta in deltas if delta is not None]
        shapes = {tuple(delta.shape) for delta in present}
        if len(shapes) > 1:
            found = ", ".join(
                f"{v.task} {tuple(d.shape)}" for v, d in zip(self.vectors, deltas, strict=True) if d is not None
            )
            raise ValueError(f"{name}: the tasks' deltas have different shapes: {found}.")
        return [self._on_device(delta) if delta is not None else self._zero_like(present[0]) for delta in deltas]

    def _on_device(self, delta: Delta) -> Delta:
        if isinstance(delta, LowRank):
            return LowRank(delta.up.to(self.device), delta.down.to(self.device))
        return delta.to(self.device)

    def _zero_like(self, delta: Delta) -> Delta:
        if isinstance(delta, LowRank):
            rows, columns = delta.shape
            up = torch.zeros(rows, 0, dtype=delta.up.dtype, device=self.device)
            return LowRank(up, torch.zeros(0, columns, dtype=delta.down.dtype, device=self.device))
        return torch.zeros(delta.shape, dtype=delta.dtype, device=self.device)


def _merge_in_shape(method: Method, deltas: Sequence[Delta], coefficients: Sequence[float]) -> Tensor:
    """Merges, seeing a convolution's ``(out, in, k, k)`` as ``(out, in·k·k)`` where the method wants matrices."""
    first = deltas[0]
    if method.elementwise or len(first.shape) == 2:
        return method.merge(deltas, coefficients)
    matrices = [delta.flatten(1) for delta in deltas if isinstance(delta, Tensor)]
    return method.merge(matrices, coefficients).reshape(first.shape)


def _agreed_kinds(vectors: Sequence[TaskVector]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for vector in vectors:
        if vector.base_hashes != vectors[0].base_hashes:
            difference = describe_difference(vectors[0].base_hashes, vector.base_hashes)
            raise ValueError(
                f"Tasks {vectors[0].task!r} and {vector.task!r} were finetuned from different bases: {difference}."
            )
        for name in vector.deltas:
            if kinds.setdefault(name, vector.kinds[name]) != vector.kinds[name]:
                raise ValueError(
                    f"{name} is a {kinds[name]} in one task and a {vector.kinds[name]} in {vector.task!r}."
                )
    return kinds
