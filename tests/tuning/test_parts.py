"""Merged weights as a function of coefficients: those of a merge with the recipe that holds these coefficients."""

import pytest
import torch
from torch import Tensor

from lightning_drm import DRM, TIES, Average, IsoC, TaskArithmetic
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Fusion, Override, Recipe
from lightning_drm.merging import Method
from lightning_drm.tuning import Parts, configured_coefficients, learned_setting, recipe_with, recipes_of_parts, stacked

TASKS = ["zeta", "alpha", "mid"]
OVERRIDES = (
    Override("dense.bias", rule="base"),
    Override("embed*", rule="average", coefficients={"alpha": 3.0}),
    Override("conv*", rule="elect"),
)


def parts_of(recipe: Recipe, vectors: list[TaskVector]) -> dict[str, Tensor]:
    models = [dict(Fusion(one, vectors)) for one in recipes_of_parts(recipe, TASKS)]
    return stacked(models, list(models[0]))


def kinds_of(vectors: list[TaskVector]) -> dict[str, str]:
    return {name: kind for vector in vectors for name, kind in vector.kinds.items()}


@pytest.mark.parametrize("method", [TaskArithmetic(0.7), TIES(0.4), DRM(density=0.5), Average()], ids=repr)
@pytest.mark.parametrize("overrides", [(), OVERRIDES], ids=["plain", "overrides"])
def test_a_recipe_with_the_coefficients_merges_to_the_same_weights(
    vectors: list[TaskVector], method: Method, overrides: tuple[Override, ...]
):
    recipe = Recipe(method, {"mid": 0.25}, overrides=overrides)
    parts, generator = parts_of(recipe, vectors), torch.Generator().manual_seed(3)
    base = {name: torch.randn(part.shape[1:], generator=generator, dtype=torch.float64) for name, part in parts.items()}

    configured = configured_coefficients(recipe, kinds_of(vectors), TASKS)
    merged = dict(Fusion(recipe, vectors))
    weights = Parts(parts, configured, by_parameter=True)(base)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, base[name] + merged[name], rtol=0, atol=1e-12)

    rows = {name: [round(float(v), 6) for v in torch.randn(3, generator=generator)] for name in parts}
    learned = recipe_with(recipe, rows, TASKS)
    merged = dict(Fusion(learned, vectors))
    weights = Parts(parts, rows, by_parameter=True)(base)
    for name, weight in weights.items():
        by_hand = base[name].clone()
        for value, part in zip(rows[name], parts[name], strict=True):
            by_hand += value * part
        torch.testing.assert_close(weight, by_hand, rtol=0, atol=1e-12)
        torch.testing.assert_close(weight, base[name] + merged[name], rtol=0, atol=1e-12)
    assert ("dense.bias" in parts) == (not overrides), "the base's value takes no coefficients"
    if overrides:
        assert not merged["dense.bias"].any(), "the rule of an override holds on"


def test_the_parts_of_task_arithmetic_are_the_deltas(vectors: list[TaskVector], dense: dict[str, list[Tensor]]):
    parts = parts_of(Recipe(TaskArithmetic(0.3)), vectors)
    for name, deltas in dense.items():
        expected = dict(zip(sorted(TASKS), deltas, strict=True))
        torch.testing.assert_close(parts[name], torch.stack([expected[task] for task in TASKS]))


def test_one_coefficient_for_each_task_needs_no_overrides(vectors: list[TaskVector]):
    recipe = Recipe(TIES(0.4, scale=2.0), overrides=[Override("embed*", rule="average")])
    rows = {name: [0.1234567, 2.0, -1.0] for name in kinds_of(vectors)}
    found = recipe_with(recipe, rows, TASKS)
    assert found.method == TIES(0.4)
    assert found.coefficients == {"zeta": 0.123457, "alpha": 2.0, "mid": -1.0}
    assert found.overrides == [Override("embed*", rule="average")]
    parts = parts_of(recipe, vectors)
    base = {name: torch.zeros_like(part[0]) for name, part in parts.items()}
    fitted = Parts(parts, rows, by_parameter=False)
    assert fitted.coefficients.shape == (1, 3)
    merged = dict(Fusion(found, vectors))
    for name, weight in fitted(base).items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)


def test_an_override_means_its_parameter_alone_whatever_characters_are_in_the_name():
    rows = {"w[0]": [1.0, 0.0], "w0": [0.0, 3.0], "w*": [5.0, 5.0]}
    deltas = {name: torch.ones(1) for name in rows}
    vectors = [TaskVector(task, deltas, dict.fromkeys(rows, "other"), {}, {}) for task in ("a", "b")]
    merged = dict(Fusion(recipe_with(Recipe(TaskArithmetic()), rows, ["a", "b"]), vectors))
    assert {name: float(delta) for name, delta in merged.items()} == {"w[0]": 1.0, "w0": 3.0, "w*": 10.0}


def test_weights_keep_the_precision_of_the_base_and_pass_gradients_through():
    parts = Parts({"w": torch.tensor([[1.0], [2.0]])}, {"w": [0.5, 0.5]}, by_parameter=True)
    weight = parts({"w": torch.tensor([1.0], dtype=torch.bfloat16)})["w"]
    assert weight.dtype == torch.bfloat16
    weight.sum().backward()
    assert parts.coefficients.grad.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("recipe", "methods", "by_parameter", "message"),
    [
        (Recipe(IsoC()), None, True, "linear in them, which IsoC is not: give --methods one of DRM, TIES, DARETIES,"),
        (Recipe(), ["IsoCTS"], True, "which IsoCTS is not"),
        (Recipe(), ["DRM", "TIES"], True, "one method at a time, got DRM, TIES"),
        (Recipe(), ["DMR"], True, "There is no method 'DMR'"),
        (Recipe(), [], True, "There are no methods to search"),
        (Recipe(overrides=OVERRIDES), None, False, "The overrides 'embed\\*' have coefficients of their own"),
    ],
)
def test_what_cannot_be_learned_is_refused(recipe: Recipe, methods: list[str], by_parameter: bool, message: str):
    with pytest.raises(ValueError, match=message):
        learned_setting(recipe, methods, by_parameter=by_parameter)


def test_another_method_has_its_own_defaults_and_the_rest_stays():
    recipe = Recipe(DRM("vertical"), {"a": 2.0}, non_matrix="elect")
    assert learned_setting(recipe, None, by_parameter=True) == recipe
    assert learned_setting(recipe, ["DRM"], by_parameter=True) == recipe
    assert learned_setting(recipe, ["TIES"], by_parameter=True) == Recipe(TIES(), {"a": 2.0}, non_matrix="elect")
