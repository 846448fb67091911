"""KnOTS, and TIES and DARE-TIES in core space, laid over task vectors: what they see, and what becomes of it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from helpers import reference
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Decompositions, Fusion, Override, Recipe, pieces
from lightning_drm.merging import DARETIES, SVC, TIES, KnOTS, LowRank, LowRankStack

TASKS = ["a", "b", "c"]
COEFFICIENTS = {"a": 0.7, "b": 1.3}
IN_ORDER = [0.7, 1.3, 1.0]
KINDS = {"query": "matrix", "fused": "matrix", "experts": "experts", "table": "embedding", "bias": "other"}
SPLIT = [Override("fused", split=[4, 8])]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_vectors() -> list[TaskVector]:
    """LoRA on two layers and three experts, and a table and a bias that were trained in full; task c has no query."""
    made = []
    for number, task in enumerate(TASKS):
        deltas = {
            "query": LowRank(drawn(10, 2, seed=number), drawn(2, 7, seed=10 + number)),
            "fused": LowRank(drawn(12, 3, seed=20 + number), drawn(3, 8, seed=30 + number)),
            "experts": LowRankStack(drawn(3, 6, 2, seed=40 + number), drawn(3, 2, 9, seed=50 + number)),
            "table": drawn(5, 4, seed=60 + number),
            "bias": drawn(9, seed=70 + number),
        }
        if task == "c":
            del deltas["query"]
        made.append(TaskVector(task, deltas, {name: KINDS[name] for name in deltas}, {}, {}))
    return made


def seen_matrices() -> dict[str, list[list[Tensor]]]:
    """By parameter, the matrices that a method sees of it: their dense deltas, of all tasks."""
    vectors = task_vectors()
    found = {}
    for name in KINDS:
        shape = vectors[0].deltas[name].shape
        deltas = [vector.deltas.get(name, torch.zeros(shape, dtype=torch.float64)) for vector in vectors]
        found[name] = [delta.up @ delta.down if isinstance(delta, LowRank) else delta for delta in deltas]
    return {
        "query": [found["query"]],
        "fused": [[delta[:4] for delta in found["fused"]], [delta[4:] for delta in found["fused"]]],
        "experts": [[delta[index] for delta in found["experts"]] for index in range(3)],
    }


METHODS = {
    "knots": (KnOTS(0.3), reference.knots_space),
    "knots_unscaled": (KnOTS(0.3, scaled=False), lambda deltas: reference.knots_space(deltas, False)),
    "core_ties": (TIES(0.3, space="core"), reference.cores),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_threshold_is_over_the_matrices_that_are_merged(name: str, device: torch.device) -> None:
    """Over the parts of a fused matrix and over single experts, as these are what the method merges."""
    method, plain = METHODS[name]
    fusion = Fusion(Recipe(method, COEFFICIENTS, overrides=SPLIT), task_vectors(), device)
    merged = {parameter: tensor.cpu() for parameter, tensor in fusion}
    seen = seen_matrices()
    expected = reference.ties_between_bases(
        [plain(deltas) for matrices in seen.values() for deltas in matrices], IN_ORDER, 0.3
    )
    query, *rest = expected
    torch.testing.assert_close(merged["query"], query, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(merged["fused"], torch.cat(rest[:2]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(merged["experts"], torch.stack(rest[2:]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [KnOTS(0.3, scale=0.8), TIES(0.3, scale=0.8, space="core")], ids=repr)
@pytest.mark.parametrize("rule", ["average", "elect"])
def test_what_is_no_matrix_follows_the_rule_for_methods_on_matrices(method, rule) -> None:
    vectors = task_vectors()
    merged = dict(Fusion(Recipe(method, COEFFICIENTS, non_matrix=rule), vectors))
    for name in ("table", "bias"):
        deltas = [vector.deltas[name] for vector in vectors]
        plain = reference.average(deltas, IN_ORDER) if rule == "average" else reference.ties(deltas, IN_ORDER, 1.0)
        torch.testing.assert_close(merged[name], 0.8 * plain, rtol=1e-12, atol=1e-12)


def test_convolutions_are_calibrated_as_the_matrices_that_are_merged() -> None:
    vectors = [
        TaskVector(task, {"conv": drawn(4, 3, 2, 2, seed=number), "dense": drawn(5, 6, seed=10 + number)},
                   {"conv": "convolution", "dense": "matrix"}, {}, {})
        for number, task in enumerate(TASKS)
    ]  # fmt: skip
    merged = dict(Fusion(Recipe(KnOTS(0.3), COEFFICIENTS, convolutions="matrix"), vectors))
    seen = [[vector.deltas[name].flatten(1) for vector in vectors] for name in ("conv", "dense")]
    conv, dense = reference.ties_between_bases([reference.knots_space(deltas) for deltas in seen], IN_ORDER, 0.3)
    torch.testing.assert_close(merged["conv"], conv.view(4, 3, 2, 2), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(merged["dense"], dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [KnOTS(0.3), TIES(0.3, space="core"), DARETIES(0.6, space="core")], ids=repr)
def test_factors_out_are_the_dense_result(method, device) -> None:
    """With the same thresholds and draws, whether an adapter or a whole model is written."""
    names = ["query", "fused"]
    fusion = Fusion(Recipe(method, COEFFICIENTS), task_vectors(), device)
    merged = dict(fusion)
    for name, factors, error in fusion.merge_low_rank(names):
        assert factors.rank <= 9
        assert error == 0.0
        torch.testing.assert_close(factors.dense(), merged[name], rtol=1e-11, atol=1e-12)


def test_draws_in_core_space_differ_by_expert_and_part_and_by_nothing_else(monkeypatch) -> None:
    (vector, *_) = task_vectors()
    delta = LowRankStack(
        *(torch.stack([part] * 3) for part in (vector.deltas["query"].up, vector.deltas["query"].down))
    )
    fused = LowRank(torch.cat([vector.deltas["query"].up] * 2), vector.deltas["query"].down)
    equal = dataclasses.replace(
        vector, deltas={"experts": delta, "fused": fused}, kinds={"experts": "experts", "fused": "matrix"}
    )
    recipe = Recipe(DARETIES(0.5, seed=1, space="core"), overrides=[Override("fused", split=2)])
    merged = dict(Fusion(recipe, [equal]))
    first, second, third = merged["experts"]
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)
    assert not torch.allclose(*merged["fused"].split(10))

    monkeypatch.setattr(pieces, "PIECE", 70)
    fusion = Fusion(recipe, [equal], shapes={"experts": (3, 10, 7), "fused": (20, 7)}, in_pieces={"experts"})
    fusion.calibrate()
    parts = [part.delta for part in fusion.merge_in_pieces("experts")]
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts), merged["experts"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [TIES(space="core"), DARETIES(space="core"), SVC(TIES(space="core"))], ids=repr)
def test_dense_deltas_are_refused_by_name(method) -> None:
    vectors = task_vectors()
    vectors[1].deltas["fused"] = drawn(12, 8, seed=0)
    sentence = r"^fused: \w+: core space needs low-rank deltas, such as LoRA's, but those of tasks \[1\] are dense \("
    with pytest.raises(ValueError, match=sentence):
        dict(Fusion(Recipe(method), vectors))


@pytest.mark.parametrize("method", [KnOTS(), TIES(space="core")], ids=repr)
def test_what_a_decomposition_refuses_has_a_name(method) -> None:
    """Thresholds come before merges, and what they are taken from is decomposed."""
    vectors = task_vectors()
    for vector in vectors:
        vector.deltas["fused"] = vector.deltas["fused"].to(torch.float32)
    vectors[2].deltas["fused"] = LowRank(vectors[2].deltas["fused"].up * 1e-35, vectors[2].deltas["fused"].down)
    with pytest.raises(ValueError, match=r"^fused: delta of task 2 reaches .*, too little for float32 .* 2 is c\)"):
        dict(Fusion(Recipe(method), vectors))


def test_a_bias_cannot_be_given_the_method() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(9,\), but TIES merges matrices"):
        Fusion(Recipe(TIES(space="core"), overrides=[Override("bias", rule="method")]), task_vectors())


def test_another_density_for_some_parameters_has_a_threshold_of_its_own() -> None:
    overrides = [Override("query", density=0.6), *SPLIT]
    merged = dict(Fusion(Recipe(TIES(0.3, space="core"), COEFFICIENTS, overrides=overrides), task_vectors()))
    seen = seen_matrices()
    (query,) = reference.ties_between_bases([reference.cores(deltas) for deltas in seen["query"]], IN_ORDER, 0.6)
    rest = reference.ties_between_bases(
        [reference.cores(deltas) for deltas in [*seen["fused"], *seen["experts"]]], IN_ORDER, 0.3
    )
    torch.testing.assert_close(merged["query"], query, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(merged["fused"], torch.cat(rest[:2]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("max_bytes", [None, 0], ids=["in memory", "on disk"])
def test_thresholds_and_merges_share_decompositions(max_bytes, tmp_path, device) -> None:
    """Six matrices, decomposed once for all densities, and for scaled entries and others."""
    with Decompositions(tmp_path, max_bytes) as kept:
        for method in (KnOTS(0.1), KnOTS(0.6, scale=0.5), KnOTS(0.3, scaled=False)):
            recipe = Recipe(method, COEFFICIENTS, overrides=SPLIT)
            again = dict(Fusion(recipe, task_vectors(), device, decompositions=kept))
            for name, delta in Fusion(recipe, task_vectors(), device):
                torch.testing.assert_close(again[name], delta, rtol=1e-12, atol=1e-13)
        assert kept.num_decomposed == 6


def test_a_calibration_of_ones_own_sees_deltas() -> None:
    """Where a user's method is prepared to merge, but calibrated in a way of its own."""
    seen = []

    class OwnCalibration(KnOTS):
        def calibrate(self, stream, *, reduce=None, num_tasks=None):
            seen.extend(stream())
            return self

    with Decompositions() as kept:
        Fusion(Recipe(OwnCalibration(), overrides=SPLIT), task_vectors(), decompositions=kept).calibrate()
    assert len(seen) == 6
    assert all(isinstance(delta, LowRank) for deltas in seen for delta in deltas)
