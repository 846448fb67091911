"""Fusion of whole task vectors against plain loops over them."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import reference, ties
from lightning_drm.deltas import TaskVector, load_task_vector, save_task_vector
from lightning_drm.fusion import Fusion, Recipe, pieces
from lightning_drm.merging import (
    DARETIES,
    DRM,
    METHODS,
    SVC,
    TIES,
    TSVM,
    WUDI,
    Average,
    Fisher,
    IsoC,
    IsoCTS,
    LowRank,
    Method,
    RegMean,
    TaskArithmetic,
)

COEFFICIENTS = {"alpha": 0.7, "mid": 1.3}  # zeta has 1.0
IN_ORDER = [0.7, 1.3, 1.0]  # alpha, mid, zeta
MATRICES = ("dense.weight", "adapted.weight")

MATRIX_METHODS = {
    "drm": (DRM(density=0.4, scale=1.5), lambda d: reference.drm(d, IN_ORDER, density=0.4, scale=1.5)),
    "drm_vertical": (
        DRM("vertical", density=0.4),
        lambda d: reference.drm(d, IN_ORDER, direction="vertical", density=0.4),
    ),
    "iso_c": (IsoC(scale=0.5), lambda d: reference.iso_c(d, IN_ORDER, scale=0.5)),
    "iso_cts": (IsoCTS(scale=0.5), lambda d: reference.iso_cts(d, IN_ORDER, scale=0.5)),
    "tsv_m": (TSVM(scale=0.5), lambda d: reference.tsv_m(d, IN_ORDER, scale=0.5)),
    "svc": (
        SVC(TaskArithmetic(0.3)),
        lambda d: reference.svc(d, reference.task_arithmetic(d, IN_ORDER, scale=0.3), IN_ORDER),
    ),
}
ELEMENTWISE = {
    "task_arithmetic": (TaskArithmetic(0.3), lambda d: reference.task_arithmetic(d, IN_ORDER, scale=0.3)),
    "average": (Average(), lambda d: reference.average(d, IN_ORDER)),
    "ties_tensor": (TIES(0.3, "tensor", 0.8), lambda d: reference.ties(d, IN_ORDER, density=0.3, scale=0.8)),
}
ALL: list[Method] = [*(kind() for kind in METHODS), SVC(DRM())]


def weighted_average(deltas: list[Tensor], scale: float) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for coefficient, delta in zip(IN_ORDER, deltas, strict=True):
        total = total + coefficient * delta
    return scale * total / len(deltas)


NOISE = 1e-15  # a low-rank delta is multiplied out in another way than in the plain loops


def assert_merged(
    merged: Iterable[tuple[str, Tensor]],
    expected: dict[str, Tensor],
    method: Method,
    dense: dict[str, list[Tensor]],
    *,
    matrices: Sequence[str] = MATRICES,
    rtol: float = 1e-6,
    atol: float = 1e-9,
) -> None:
    """The same parameters with the same deltas, but for entries that rounding decides."""
    found = dict(merged)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        found[name] = found[name].cpu()
        if method.elementwise:
            tensor = ties.settled(found[name], tensor, method, dense[name], noise=NOISE)
        elif name in matrices:
            ours, theirs, *deltas = (part.flatten(1) for part in (found[name], tensor, *dense[name]))
            tensor = ties.settled(ours, theirs, method, deltas, noise=NOISE).reshape(tensor.shape)
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_matrix_methods_average_the_rest(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], name: str, device: torch.device
) -> None:
    method, plain = MATRIX_METHODS[name]
    expected = {
        parameter: plain(deltas) if parameter in MATRICES else weighted_average(deltas, method.scale)
        for parameter, deltas in dense.items()
    }
    assert_merged(Fusion(Recipe(method, COEFFICIENTS), vectors, device), expected, method, dense)


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_convolutions_as_matrices(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], name: str, device: torch.device
) -> None:
    method, plain = MATRIX_METHODS[name]
    fusion = Fusion(Recipe(method, COEFFICIENTS, convolutions="matrix"), vectors, device)
    merged = {parameter: tensor.cpu() for parameter, tensor in fusion}
    deltas = [delta.reshape(4, 12) for delta in dense["conv.weight"]]
    expected = ties.settled(merged["conv.weight"].reshape(4, 12), plain(deltas), method, deltas)
    torch.testing.assert_close(merged["conv.weight"], expected.reshape(4, 3, 2, 2), rtol=1e-6, atol=1e-9)
    averaged = weighted_average(dense["conv.weight"], method.scale)
    assert not torch.allclose(merged["conv.weight"], averaged)
    averaged = weighted_average(dense["embed.weight"], method.scale)
    torch.testing.assert_close(merged["embed.weight"], averaged, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_methods_merge_everything(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], name: str, device: torch.device
) -> None:
    method, plain = ELEMENTWISE[name]
    expected = {parameter: plain(deltas) for parameter, deltas in dense.items()}
    assert_merged(Fusion(Recipe(method, COEFFICIENTS), vectors, device), expected, method, dense)


def test_ties_threshold_is_over_the_whole_task_vector(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], device: torch.device
) -> None:
    flat = [torch.cat([deltas[task].flatten() for deltas in dense.values()]) for task in range(3)]
    trimmed = torch.stack([reference.trim(vector, 0.3) for vector in flat])
    merged = dict(Fusion(Recipe(TIES(0.3, "global", 0.9), COEFFICIENTS), vectors, device))
    found = torch.cat([merged[name].flatten().cpu() for name in dense])
    whole = 0.9 * reference.elect_and_average(trimmed, IN_ORDER)
    whole = ties.settled(found, whole, TIES(0.3), flat, noise=NOISE)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-9)
    sizes = [deltas[0].numel() for deltas in dense.values()]
    expected = {name: part.reshape(dense[name][0].shape) for name, part in zip(dense, whole.split(sizes), strict=True)}
    per_tensor = dict(Fusion(Recipe(TIES(0.3, "tensor", 0.9), COEFFICIENTS), vectors))
    assert any(not torch.allclose(per_tensor[name], expected[name]) for name in expected), "the case shows nothing"


def test_dare_keeps_and_rescales(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], device: torch.device
) -> None:
    """One task alone: each entry is gone, or divided by the density."""
    vector = vectors[0]
    fusion = Fusion(Recipe(DARETIES(0.25, seed=3), {"zeta": 2.0}), [vector], device)
    merged = {name: tensor.cpu() for name, tensor in fusion}
    kept = torch.cat([tensor.flatten() != 0 for tensor in merged.values()])
    for name, tensor in merged.items():
        full = 2.0 * dense[name][2] / 0.25
        torch.testing.assert_close(tensor, torch.where(tensor != 0, full, 0.0), rtol=1e-12, atol=0)
    assert 0.15 < float(kept.double().mean()) < 0.35


def test_dare_draws_depend_on_seed_task_and_parameter_alone(vectors: list[TaskVector]) -> None:
    def masks(seed: int, chosen: list[TaskVector]) -> dict[str, Tensor]:
        return {name: tensor != 0 for name, tensor in Fusion(Recipe(DARETIES(0.5, seed=seed)), chosen)}

    def only(vector: TaskVector, names: list[str]) -> TaskVector:
        return dataclasses.replace(vector, deltas={name: vector.deltas[name] for name in names})

    zeta = vectors[0]
    mask = masks(0, [zeta])
    assert torch.equal(masks(0, [zeta])["dense.weight"], mask["dense.weight"])
    assert torch.equal(masks(0, [only(zeta, ["dense.weight"])])["dense.weight"], mask["dense.weight"])
    assert not torch.equal(masks(1, [zeta])["dense.weight"], mask["dense.weight"])
    assert not torch.equal(masks(0, [dataclasses.replace(zeta, task="other")])["dense.weight"], mask["dense.weight"])
    # Two parameters of one shape must not lose the same entries.
    twin = dataclasses.replace(
        zeta,
        deltas={"a": zeta.deltas["dense.weight"], "b": zeta.deltas["dense.weight"]},
        kinds={"a": "matrix", "b": "matrix"},
    )
    drawn = masks(0, [twin])
    assert not torch.equal(drawn["a"], drawn["b"])


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_order_of_tasks_changes_no_bit(vectors: list[TaskVector], method: Method, device: torch.device) -> None:
    recipe = Recipe(method, COEFFICIENTS, convolutions="matrix")
    first = dict(Fusion(recipe, vectors, device))
    for order in itertools.permutations(vectors):
        for name, tensor in Fusion(recipe, list(order), device):
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_same_from_disk_and_again(
    vectors: list[TaskVector], tmp_path: Path, method: Method, device: torch.device
) -> None:
    for vector in vectors:
        save_task_vector(vector, tmp_path / vector.task)
    recipe = Recipe(method, COEFFICIENTS)
    stored = Fusion(recipe, [load_task_vector(tmp_path / vector.task) for vector in vectors], device)
    merged = dict(Fusion(recipe, vectors, device))
    for _ in range(2):
        for name, tensor in stored:
            torch.testing.assert_close(tensor, merged[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_missing_counts_as_zero(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], method: Method, device: torch.device
) -> None:
    """Leaving a parameter out, dense or low-rank, is the same as a delta of zeros."""
    present = {vector.task: vector for vector in vectors}
    rows, columns = present["zeta"].deltas["adapted.weight"].shape
    zeros = {
        "alpha": {
            "dense.weight": torch.zeros(9, 7, dtype=torch.float64),
            "adapted.weight": LowRank(
                torch.zeros(rows, 2, dtype=torch.float64), torch.ones(2, columns, dtype=torch.float64)
            ),
        },
        "zeta": {"dense.bias": torch.zeros(9, dtype=torch.float64)},
        "mid": {
            "conv.weight": torch.zeros(4, 3, 2, 2, dtype=torch.float64),
            "scale": torch.zeros((), dtype=torch.float64),
        },
    }
    kinds = {name: kind for vector in vectors for name, kind in vector.kinds.items()}
    filled = [
        dataclasses.replace(vector, deltas={**vector.deltas, **zeros[vector.task]}, kinds=kinds) for vector in vectors
    ]
    recipe = Recipe(method, COEFFICIENTS, convolutions="matrix")
    with_zeros = {name: tensor.cpu() for name, tensor in Fusion(recipe, filled, device)}
    fusion = Fusion(recipe, vectors, device)
    if isinstance(method, DARETIES):
        assert all(torch.equal(tensor.cpu(), with_zeros[name]) for name, tensor in fusion)
    else:
        matrices = (*MATRICES, "conv.weight")
        assert_merged(fusion, with_zeros, method, dense, matrices=matrices, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [DRM(), TIES(0.5), IsoC()], ids=lambda method: type(method).__name__)
def test_low_rank_and_dense_deltas_of_one_parameter_mix(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], method: Method, device: torch.device
) -> None:
    mixed = [
        dataclasses.replace(
            vector,
            deltas={
                name: delta.up @ delta.down if isinstance(delta, LowRank) and vector.task == "mid" else delta
                for name, delta in vector.deltas.items()
            },
        )
        for vector in vectors
    ]
    expected = dict(Fusion(Recipe(method), vectors))
    assert_merged(Fusion(Recipe(method), mixed, device), expected, method, dense)


def test_one_task_with_everything_kept_is_itself(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], device: torch.device
) -> None:
    """The merge of one task with no pruning is its finetune: a LoRA's delta included."""
    recipe = Recipe(DRM(density=1.0, rank_tol=0.0))
    for name, tensor in Fusion(recipe, [vectors[0]], device):
        torch.testing.assert_close(tensor.cpu(), dense[name][2], rtol=1e-6, atol=1e-9)


def test_inputs_are_not_changed(vectors: list[TaskVector]) -> None:
    def snapshot() -> list[Tensor]:
        tensors = [
            t for v in vectors for d in v.deltas.values() for t in ((d.up, d.down) if isinstance(d, LowRank) else (d,))
        ]
        return [tensor.clone() for tensor in tensors]

    before = snapshot()
    for method in ALL:
        assert len(dict(Fusion(Recipe(method, COEFFICIENTS, convolutions="matrix"), vectors))) == 7
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, snapshot(), strict=True))


def test_different_bases_are_refused(vectors: list[TaskVector]) -> None:
    other = dataclasses.replace(vectors[1], base_hashes={**vectors[1].base_hashes, "frozen": "another"})
    with pytest.raises(ValueError, match=r"'alpha' and 'mid' were finetuned from different bases: .*\(frozen\)"):
        Fusion(Recipe(Average()), [vectors[0], other, vectors[2]])


def test_different_kinds_are_refused(vectors: list[TaskVector]) -> None:
    other = dataclasses.replace(vectors[2], kinds={**vectors[2].kinds, "embed.weight": "matrix"})
    message = r"disagree on embed\.weight: its kind is 'embedding' in task 'alpha' and 'matrix' in task 'mid'"
    with pytest.raises(ValueError, match=message):
        Fusion(Recipe(Average()), [vectors[0], vectors[1], other])


@pytest.mark.parametrize("method", [Average(), TIES(), DRM()], ids=lambda method: type(method).__name__)
def test_different_shapes_are_refused(vectors: list[TaskVector], method: Method) -> None:
    other = dataclasses.replace(
        vectors[2], deltas={**vectors[2].deltas, "dense.weight": torch.zeros(9, 8, dtype=torch.float64)}
    )
    with pytest.raises(ValueError, match=r"dense\.weight: .*different shapes: mid \(9, 8\), zeta \(9, 7\)"):
        dict(Fusion(Recipe(method), [vectors[0], vectors[1], other]))


def test_unknown_coefficients_are_refused(vectors: list[TaskVector]) -> None:
    with pytest.raises(ValueError, match=r"unknown tasks topik, x; tasks: zeta, alpha, mid"):
        Fusion(Recipe(Average(), {"x": 1.0, "topik": 2.0, "mid": 1.0}), vectors)


def test_coefficients_belong_to_names(vectors: list[TaskVector]) -> None:
    recipe = Recipe(TaskArithmetic(1.0), {"zeta": 1.0, "alpha": 0.0, "mid": 0.0})
    for name, tensor in Fusion(recipe, vectors):
        delta = vectors[0].deltas.get(name)
        expected = (
            torch.zeros_like(tensor)
            if delta is None
            else delta.up @ delta.down
            if isinstance(delta, LowRank)
            else delta
        )
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-15)


def test_rules() -> None:
    kinds = ("matrix", "experts", "convolution", "embedding", "output_embedding", "other")
    assert [Recipe(DRM()).rule(kind) for kind in kinds] == ["method", "method", *["average"] * 4]
    assert [Recipe(DRM(), convolutions="matrix").rule(kind) for kind in kinds] == [*["method"] * 3, *["average"] * 3]
    assert [Recipe(DRM(), non_matrix="elect").rule(kind) for kind in kinds] == ["method", "method", *["elect"] * 4]
    assert [Recipe(TIES()).rule(kind) for kind in kinds] == ["method"] * 6


@pytest.mark.parametrize("method", [TaskArithmetic(0.3), Average(), TIES(0.3), DARETIES(0.5)], ids=repr)
def test_pieces_are_those_of_whole_parameters(
    vectors: list[TaskVector],
    dense: dict[str, list[Tensor]],
    method: Method,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """A few rows at a time, of task vectors in memory; whole parameters are compared with plain loops above."""
    expected = dict(Fusion(Recipe(method, COEFFICIENTS), vectors, device))
    monkeypatch.setattr(pieces, "PIECE", 8)
    monkeypatch.setattr(pieces, "DEVICE_PIECE", 8)
    shapes = {parameter: tuple(deltas[0].shape) for parameter, deltas in dense.items()}
    fusion = Fusion(Recipe(method, COEFFICIENTS), vectors, device, shapes=shapes, in_pieces=shapes.keys())
    fusion.calibrate()
    parts = {parameter: [merged.delta for merged in fusion.merge_in_pieces(parameter)] for parameter in shapes}
    assert len(parts["embed.weight"]) > 1
    for parameter, found in parts.items():
        merged = torch.cat(found) if shapes[parameter] else found[0]
        torch.testing.assert_close(merged, expected[parameter], rtol=1e-12, atol=0)


def test_a_method_on_matrices_cannot_be_given_pieces(vectors: list[TaskVector]) -> None:
    with pytest.raises(AssertionError):
        Fusion(Recipe(DRM()), vectors, shapes={"dense.weight": (9, 7)}, in_pieces={"dense.weight"})


def test_statistics_reach_the_method_and_what_has_none_is_averaged(
    vectors: list[TaskVector], dense: dict[str, list[Tensor]], device: torch.device
) -> None:
    """RegMean by its formula on both matrices, from factors on one of them; the rest by a mean of the same weights."""
    fusion = Fusion(Recipe(RegMean(), COEFFICIENTS, convolutions="matrix"), vectors, device)
    merged = {name: tensor.cpu() for name, tensor in fusion}
    in_order = sorted(vectors, key=lambda vector: vector.task)
    for name, deltas in dense.items():
        mean = sum(c * delta for c, delta in zip(IN_ORDER, deltas, strict=True)) / sum(IN_ORDER)
        if name in MATRICES:
            grams = [vector.statistics.tensors[f"gram::{name}"] for vector in in_order]
            shrunk = [c * (0.95 * g + 0.05 * torch.diag(g.diagonal())) for c, g in zip(IN_ORDER, grams, strict=True)]
            met = sum(delta @ gram for delta, gram in zip(deltas, shrunk, strict=True))
            mean = met @ torch.linalg.inv(sum(shrunk))
        torch.testing.assert_close(merged[name], mean, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_fisher_takes_the_norm_of_the_whole_model(vectors: list[TaskVector], dense: dict[str, list[Tensor]]) -> None:
    in_order = sorted(vectors, key=lambda vector: vector.task)
    strong = [dataclasses.replace(v, statistics=dataclasses.replace(v.statistics, fisher_norm=n)) for v, n in
              zip(in_order, (1.0, 4.0, 0.5), strict=True)]  # fmt: skip
    for name, tensor in Fusion(Recipe(Fisher(), COEFFICIENTS), strong):
        weights = [
            c * v.statistics.tensors[f"fisher::{name}"].clamp(min=1e-6) / v.statistics.fisher_norm
            for c, v in zip(IN_ORDER, strong, strict=True)
        ]
        expected = sum(w * d for w, d in zip(weights, dense[name], strict=True)) / sum(weights)
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [RegMean(), WUDI(input_weight=1.0), WUDI()], ids=repr)
def test_a_matrix_that_is_stored_in_out_is_merged_the_other_way_round(vectors: list[TaskVector], method: Method):
    """Inputs are the columns of (out, in); transposed by hand, the result is the same."""

    def turned(vector: TaskVector) -> TaskVector:
        return dataclasses.replace(vector, deltas={n: d.T if n in MATRICES else d for n, d in vector.deltas.items()})

    expected = dict(Fusion(Recipe(method), vectors))
    stored = dict(Fusion(Recipe(method), [turned(vector) for vector in vectors], transposed=set(MATRICES)))
    for name in MATRICES:
        torch.testing.assert_close(stored[name].T, expected[name], rtol=1e-10, atol=1e-12)
    name = "adapted.weight"
    adapted = [
        dataclasses.replace(vector, deltas={name: vector.deltas[name].T}, kinds={name: "matrix"})
        for vector in vectors
        if name in vector.deltas
    ]
    fusion = Fusion(Recipe(method), adapted, transposed={name})
    ((_, factors, _),) = fusion.merge_low_rank([name])
    torch.testing.assert_close(factors.dense(), dict(fusion)[name], rtol=1e-10, atol=1e-12)


def test_missing_statistics_are_refused_by_name(vectors: list[TaskVector]) -> None:
    without = [dataclasses.replace(vectors[0], statistics=None), *vectors[1:]]
    with pytest.raises(
        ValueError, match=r"RegMean needs statistics .* \(gram\), and there are none of zeta: `lightning"
    ):
        Fusion(Recipe(RegMean()), without)
    with pytest.raises(
        ValueError, match=r"statistics of 64 training samples .* those that were collected are of 256 of"
    ):
        Fusion(Recipe(RegMean(num_samples=64)), vectors)
    assert dict(Fusion(Recipe(DRM()), without)).keys() == dict(Fusion(Recipe(DRM()), vectors)).keys()


def test_weights_that_are_none_are_refused(vectors: list[TaskVector]) -> None:
    with pytest.raises(ValueError, match="RegMean takes coefficients as weights of a mean"):
        Fusion(Recipe(RegMean(), {"alpha": -1.0}), vectors)
