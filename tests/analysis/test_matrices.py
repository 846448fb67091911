"""Which matrices are studied, and in what order."""

import numpy as np
import torch

from lightning_drm.analysis.matrices import Matrices, drm_of, matrix_of
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Recipe
from lightning_drm.merging import DRM, LowRank, TaskArithmetic
from lightning_drm.merging.low_rank import densify


def test_matrices_are_those_that_a_matrix_method_merges(
    vectors: list[TaskVector], dense: dict[str, list[torch.Tensor]]
):
    by_task = {vector.task: vector for vector in vectors}
    found = dict(Matrices(by_task, Recipe()))
    assert list(found) == ["adapted.weight", "dense.weight"]
    for name, deltas in found.items():
        for delta, plain in zip(deltas, dense[name], strict=True):
            np.testing.assert_array_equal(densify(delta), plain)
    assert all(isinstance(delta, LowRank) for delta in found["adapted.weight"])
    with_convolutions = dict(Matrices(by_task, Recipe(convolutions="matrix")))
    assert with_convolutions["conv.weight"][0].shape == (4, 12)


def test_experts_are_matrices_of_their_own():
    stack = torch.arange(12.0).reshape(3, 2, 2)
    vector = TaskVector("a", {"up": stack, "0.weight": torch.eye(2)}, {"up": "experts", "0.weight": "matrix"}, {}, {})
    found = Matrices({"a": vector}, Recipe())
    assert [name for name, _ in found] == ["up[0]", "up[1]", "up[2]", "0.weight"]
    for name, (delta,) in found:
        assert torch.equal(matrix_of(vector.deltas, name), delta)


def test_layers_are_in_the_order_of_depth():
    names = [f"layer.{block}.weight" for block in (10, 2, 1)]
    vector = TaskVector("a", dict.fromkeys(names, torch.eye(2)), dict.fromkeys(names, "matrix"), {}, {})
    assert Matrices({"a": vector}, Recipe()).names == names[::-1]
    assert Matrices({"a": vector}, Recipe(), "*.1*").names == ["layer.1.weight", "layer.10.weight"]


def test_other_methods_are_studied_in_the_basis_of_drm():
    assert drm_of(Recipe(DRM(density=0.5))).density == 0.5
    assert drm_of(Recipe(TaskArithmetic())) == DRM()
