"""Experts in one 3-D weight: a method on matrices merges each alone; what works entry by entry, all at once."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import reference, ties
from helpers.devices import on
from lightning_drm.deltas import Collected, TaskStatistics, TaskVector
from lightning_drm.fusion import Fusion, Override, Recipe, pieces
from lightning_drm.fusion.share_out import costs
from lightning_drm.merging import (
    DARETIES,
    DRM,
    TIES,
    TSVM,
    WUDI,
    Average,
    IsoC,
    IsoCTS,
    LowRankStack,
    Method,
    RegMean,
    Statistics,
    TaskArithmetic,
)
from lightning_drm.merging.low_rank import densify

NAME, SHAPE, TASKS = "mlp.experts.gate_up_proj", (5, 8, 6), ["a", "b", "c"]
COEFFICIENTS = {"a": 0.7, "b": 1.3}
IN_ORDER = [0.7, 1.3, 1.0]
MATRIX_METHODS = {
    DRM(density=0.4): lambda d: reference.drm(d, IN_ORDER, density=0.4),
    DRM("vertical", density=0.4): lambda d: reference.drm(d, IN_ORDER, direction="vertical", density=0.4),
    IsoC(): lambda d: reference.iso_c(d, IN_ORDER),
    IsoCTS(): lambda d: reference.iso_cts(d, IN_ORDER),
    TSVM(): lambda d: reference.tsv_m(d, IN_ORDER),
}


def vectors_of(deltas: Sequence[Tensor | LowRankStack], kind: str = "experts") -> list[TaskVector]:
    return [TaskVector(task, {NAME: delta}, {NAME: kind}, {}, {}) for task, delta in zip(TASKS, deltas, strict=True)]


def turned(stack: Tensor | LowRankStack) -> Tensor | LowRankStack:
    return stack.T if isinstance(stack, LowRankStack) else stack.mT


@pytest.fixture
def dense() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in TASKS]


@pytest.fixture
def low_rank() -> list[LowRankStack]:
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    return [LowRankStack(torch.randn(5, 8, r, **options), torch.randn(5, r, 6, **options)) for r in (1, 2, 2)]


@pytest.mark.parametrize("method", MATRIX_METHODS, ids=repr)
@pytest.mark.parametrize("deltas", ["dense", "low_rank"])
def test_each_expert_is_a_matrix_of_its_own(
    method: Method, deltas: str, request: pytest.FixtureRequest, device: torch.device
) -> None:
    stacks = request.getfixturevalue(deltas)
    merged = dict(Fusion(Recipe(method, COEFFICIENTS), vectors_of(stacks), device))[NAME]
    assert merged.shape == SHAPE
    noise = 1e-14 if deltas == "low_rank" else 0.0
    for index, found in enumerate(merged):
        matrices = [densify(stack)[index] for stack in stacks]
        expected = ties.settled(found.cpu(), MATRIX_METHODS[method](matrices), method, matrices, noise=noise)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-7, atol=1e-9)
        alone = [stack.matrix(index) if isinstance(stack, LowRankStack) else stack[index] for stack in stacks]
        assert torch.equal(found, method.merge(on(device, alone), IN_ORDER))


@pytest.mark.parametrize("method", [RegMean(), WUDI(input_weight=1.0)], ids=repr)
@pytest.mark.parametrize("in_out", [False, True], ids=["out, in", "in, out"])
@pytest.mark.parametrize("deltas", ["dense", "low_rank"])
def test_each_expert_has_its_own_statistics(
    method: Method, in_out: bool, deltas: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two experts each change nothing."""
    stacks = request.getfixturevalue(deltas)
    inputs = [torch.randn(5, 12, 6, dtype=torch.float64) for _ in TASKS]
    grams = [one.mT @ one / 12 for one in inputs]
    vectors = [
        replace(vector, statistics=TaskStatistics({NAME: gram}, {"gram": {NAME: NAME}}, {"gram": Collected()}))
        for vector, gram in zip(
            vectors_of([turned(stack) if in_out else stack for stack in stacks]), grams, strict=True
        )
    ]
    options = {"transposed": {NAME} if in_out else frozenset()}
    whole = dict(Fusion(Recipe(method, COEFFICIENTS), vectors, **options))[NAME]
    monkeypatch.setattr(pieces, "PIECE", 2 * 8 * 6)
    shape = tuple(whole.shape)
    fusion = Fusion(Recipe(method, COEFFICIENTS), vectors, shapes={NAME: shape}, in_pieces={NAME}, **options)
    fusion.calibrate()
    assert torch.equal(torch.cat([merged.delta for merged in fusion.merge_in_pieces(NAME)]), whole)
    assert [one.gram.shape for one in fusion.deltas.statistics(NAME, "gram", slice(2, 4))] == [(2, 6, 6)] * len(TASKS)
    for index, found in enumerate(whole):
        matrices = [densify(stack)[index] for stack in stacks]
        statistics = [Statistics(gram=gram[index]) for gram in grams]
        expected = method.merge(matrices, IN_ORDER, statistics=statistics)
        torch.testing.assert_close(found.T if in_out else found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [TIES(0.3), DARETIES(0.5), TaskArithmetic(0.3), Average()], ids=repr)
@pytest.mark.parametrize("deltas", ["dense", "low_rank"])
def test_elementwise_methods_see_no_experts(
    method: Method, deltas: str, request: pytest.FixtureRequest, device: torch.device
) -> None:
    stacks = request.getfixturevalue(deltas)
    found = dict(Fusion(Recipe(method, COEFFICIENTS), vectors_of(stacks), device))
    plain = dict(
        Fusion(Recipe(method, COEFFICIENTS), vectors_of([densify(stack) for stack in stacks], "other"), device)
    )
    torch.testing.assert_close(found[NAME], plain[NAME], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("deltas", ["dense", "low_rank"])
@pytest.mark.parametrize("missing", [False, True])
def test_pieces_are_some_experts_and_change_no_bit(
    deltas: str, missing: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = vectors_of(request.getfixturevalue(deltas))
    if missing:
        vectors[1] = TaskVector("b", {}, {}, {}, {})
    expected = dict(Fusion(Recipe(DRM(), COEFFICIENTS), vectors))[NAME]
    monkeypatch.setattr(pieces, "PIECE", 2 * 8 * 6)
    fusion = Fusion(Recipe(DRM(), COEFFICIENTS), vectors, shapes={NAME: SHAPE}, in_pieces={NAME})
    fusion.calibrate()
    found = list(fusion.merge_in_pieces(NAME))
    assert [merged.rows for merged in found] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    if not missing:
        assert torch.equal(torch.cat([merged.delta for merged in found]), expected)


@pytest.mark.parametrize("split", [2, [2, 6]])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_split(split: int | list[int], transposed: bool, dense: list[Tensor]) -> None:
    """As gate and up in one weight, which other files hold apart."""
    stacks = [delta.mT.contiguous() for delta in dense] if transposed else dense
    recipe = Recipe(DRM(density=0.4), COEFFICIENTS, overrides=[Override("*gate_up*", split=split)])
    fusion = Fusion(recipe, vectors_of(stacks), transposed={NAME} if transposed else frozenset())
    merged = dict(fusion)[NAME]
    merged = merged.mT if transposed else merged
    method = DRM("horizontal", density=0.4)
    for index in range(SHAPE[0]):
        for rows in (slice(0, 4), slice(4, 8)) if split == 2 else (slice(0, 2), slice(2, 8)):
            parts = [delta[index, rows].T if transposed else delta[index, rows] for delta in dense]
            found = merged[index, rows].T if transposed else merged[index, rows]
            expected = ties.settled(found, reference.drm(parts, IN_ORDER, density=0.4), method, parts)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("split", "transposed", "problem"),
    [
        (3, False, "its 8 rows do not divide into 3 equal parts"),  # its columns would
        (4, True, "its 6 columns do not divide into 4 equal parts"),
        ([2, 4], False, "it has 8 rows, but the parts add up to 6"),
        ([2, 6], True, "it has 6 columns, but the parts add up to 8"),
        ([9, -1], False, r"every part takes at least 1 of its rows, but the parts are \[9, -1\]"),
        ([], False, r"every part takes at least 1 of its rows, but the parts are \[\]"),
    ],
)
def test_a_split_that_does_not_fit_an_expert_is_refused(
    split: int | list[int], transposed: bool, problem: str, dense: list[Tensor]
) -> None:
    recipe = Recipe(DRM(), overrides=[Override("*", split=split)])
    with pytest.raises(ValueError, match=rf"of shape \(5, 8, 6\) cannot be split: {problem}"):
        Fusion(recipe, vectors_of(dense), transposed={NAME} if transposed else frozenset())


@pytest.mark.parametrize("rule", ["average", "elect", "base"])
def test_other_rules(rule: str, dense: list[Tensor]) -> None:
    merged = dict(Fusion(Recipe(DRM(), COEFFICIENTS, overrides=[Override("*", rule=rule)]), vectors_of(dense)))[NAME]
    expected = {
        "average": reference.average(dense, IN_ORDER),
        "elect": reference.ties(dense, IN_ORDER, density=1.0),
        "base": torch.zeros(SHAPE, dtype=torch.float64),
    }[rule]
    torch.testing.assert_close(merged.double(), expected, rtol=1e-12, atol=1e-14)


def test_a_convolution_of_three_dimensions_stays_one_matrix(dense: list[Tensor]) -> None:
    averaged = dict(Fusion(Recipe(DRM(), COEFFICIENTS), vectors_of(dense, "convolution")))[NAME]
    torch.testing.assert_close(averaged, reference.average(dense, IN_ORDER), rtol=1e-12, atol=1e-14)
    method = DRM(density=0.4)
    merged = dict(Fusion(Recipe(method, COEFFICIENTS, convolutions="matrix"), vectors_of(dense, "convolution")))[NAME]
    flat = [delta.flatten(1) for delta in dense]
    expected = ties.settled(merged.flatten(1), reference.drm(flat, IN_ORDER, density=0.4), method, flat)
    torch.testing.assert_close(merged.flatten(1), expected, rtol=1e-9, atol=1e-11)


def test_an_expert_that_no_task_trained_stays(dense: list[Tensor]) -> None:
    for delta in dense:
        delta[3] = 0
    merged = dict(Fusion(Recipe(DRM()), vectors_of(dense)))[NAME]
    assert not merged[3].any()
    assert all(merged[index].any() for index in (0, 1, 2, 4))


def test_errors_name_the_expert(dense: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    dense[1][2, 0, 0] = torch.nan
    named = rf"{NAME}: expert 2: DRM: delta of task 1 holds NaN .*1 is b"
    with pytest.raises(ValueError, match=named):
        dict(Fusion(Recipe(DRM()), vectors_of(dense)))
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "PIECE", 2 * 8 * 6)  # it is the first one of a piece
        fusion = Fusion(Recipe(DRM()), vectors_of(dense), shapes={NAME: SHAPE}, in_pieces={NAME})
        with pytest.raises(ValueError, match=named):
            list(fusion.merge_in_pieces(NAME))
    dense[1] = -dense[0]
    dense[2] = torch.zeros_like(dense[0])
    for index in range(SHAPE[0]):
        if index != 3:  # only in this one do the changes cancel each other
            dense[2][index] = torch.eye(8, 6)
    with pytest.raises(ValueError, match=rf"{NAME}: expert 3: nothing is left of what task 0, 1 changed"):
        dict(Fusion(Recipe(DRM(scale=1.0)), vectors_of(dense)))


class Counting(TSVM):
    """A method on matrices that looks at all of them first."""

    def calibrate(self, stream, *, reduce, num_tasks=None):
        self.seen = [tuple(deltas[0].shape) for deltas in stream()]
        return self


def test_a_calibration_sees_one_expert_after_another(dense: list[Tensor]) -> None:
    method = Counting()
    vectors = [
        TaskVector(v.task, {**v.deltas, "fc.weight": torch.ones(4, 4)}, {**v.kinds, "fc.weight": "matrix"}, {}, {})
        for v in vectors_of(dense)
    ]
    Fusion(Recipe(method), vectors).calibrate()
    assert method.seen == [*[(8, 6)] * 5, (4, 4)]


@pytest.mark.parametrize("method", [DRM(), DRM("vertical"), IsoC(), TSVM()], ids=repr)
@pytest.mark.parametrize("rank", [None, 6])
def test_their_cost_is_the_sum(method: Method, rank: int | None) -> None:
    treatment = Recipe(method).treatment(NAME, "experts", TASKS)
    ranks = {} if rank is None else {NAME: rank}
    assert costs({NAME: treatment}, {NAME: (128, 64, 32)}, 3, ranks)[NAME] == pytest.approx(
        128 * method.cost((64, 32), 3, rank)
    )
    halves = Recipe(method, overrides=[Override("*", split=2)]).treatment(NAME, "experts", TASKS)
    assert costs({NAME: halves}, {NAME: (128, 64, 32)}, 3, ranks)[NAME] == pytest.approx(
        256 * method.cost((32, 32), 3, rank)
    )
