"""What the algebra promises, on inputs that hypothesis makes up: tall, wide, 1 × n, rank deficient, with zero tasks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ties
from lightning_drm.merging import (
    DARETIES,
    DRM,
    STAR,
    SVC,
    TIES,
    TSVM,
    WUDI,
    Average,
    DCMerge,
    IsoC,
    IsoCTS,
    KnOTS,
    LowRank,
    Method,
    TaskArithmetic,
)
from lightning_drm.merging import METHODS as ALL_METHODS

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
DIRECTIONS = st.sampled_from(["horizontal", "vertical"])
METHODS = st.sampled_from(
    [
        DRM(), DRM("vertical"), DRM(prune="individual"), TIES(), TaskArithmetic(), Average(), IsoC(), IsoCTS(), TSVM(),
        WUDI(), DCMerge(0.2), STAR(), KnOTS(), KnOTS(0.4, scaled=False),
    ]
)  # fmt: skip
ROTATIONAL = [IsoC(), IsoCTS(), TSVM(), WUDI(), DCMerge(0.2), STAR()]
SPECTRAL = st.sampled_from(
    [DRM(), DRM("vertical"), KnOTS(), KnOTS(scaled=False), TaskArithmetic(), Average(), *ROTATIONAL]
)
LINEAR = [kind() for kind in ALL_METHODS if kind.linear] + [DRM("vertical"), DRM(prune="individual")]


@st.composite
def tasks(draw: st.DrawFn, max_tasks: int = 5) -> list[torch.Tensor]:
    """Deltas of one shape: generic, of low rank, or zero; float64."""
    m = draw(st.integers(1, 24))
    n = draw(st.integers(1, 24))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = draw(st.lists(st.sampled_from(["full", "full", "low", "zero"]), min_size=1, max_size=max_tasks))
    deltas = []
    for kind in kinds:
        rank = {"full": min(m, n), "low": max(1, min(m, n) // 3), "zero": 0}[kind]
        left = torch.randn(m, rank, generator=g, dtype=torch.float64)
        right = torch.randn(rank, n, generator=g, dtype=torch.float64)
        deltas.append(left @ right / (rank or 1) ** 0.5)
    return deltas


def rotation(size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


def close(actual: torch.Tensor, expected: torch.Tensor, method: Method, deltas: list[torch.Tensor]) -> bool:
    """Whether two merges of the same deltas agree, but for entries that rounding decides."""
    expected = ties.settled(actual, expected, method, deltas)
    return bool(torch.linalg.norm(actual - expected) <= 1e-7 * torch.linalg.norm(expected) + 1e-12)


@SETTINGS
@given(deltas=tasks(), method=METHODS, order=st.randoms(use_true_random=False))
def test_order_of_tasks_changes_nothing(deltas: list[torch.Tensor], method: Method, order) -> None:
    positions = list(range(len(deltas)))
    order.shuffle(positions)
    coefficients = [1.0 + 0.1 * position for position in range(len(deltas))]
    shuffled = method.merge([deltas[i] for i in positions], [coefficients[i] for i in positions])
    assert close(shuffled, method.merge(deltas, coefficients), method, deltas)


@SETTINGS
@given(deltas=tasks(), method=METHODS)
def test_result_is_finite_and_inputs_are_untouched(deltas: list[torch.Tensor], method: Method) -> None:
    before = [delta.clone() for delta in deltas]
    merged = method.merge(deltas)
    assert merged.shape == deltas[0].shape
    assert merged.isfinite().all()
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True))


@SETTINGS
@given(deltas=tasks(), method=METHODS)
def test_negated_deltas_give_the_negated_result(deltas: list[torch.Tensor], method: Method) -> None:
    assert close(method.merge([-delta for delta in deltas]), -method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks(), method=METHODS, exponent=st.integers(-60, 60))
def test_scaled_deltas_give_the_scaled_result(deltas: list[torch.Tensor], method: Method, exponent: int) -> None:
    factor = 2.0**exponent
    scaled = method.merge([factor * delta for delta in deltas])
    assert close(scaled / factor, method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks(), method=METHODS, factor=st.floats(-3, 3))
def test_shared_coefficient_scales_the_result(deltas: list[torch.Tensor], method: Method, factor: float) -> None:
    if factor < 0 and isinstance(method, IsoC | IsoCTS | TSVM):
        factor = -factor
    scaled = method.merge(deltas, [factor] * len(deltas))
    assert close(scaled, factor * method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks(), direction=DIRECTIONS, seed=st.integers(0, 2**31))
def test_drm_commutes_with_rotations_of_the_side_that_is_not_pruned(
    deltas: list[torch.Tensor], direction: str, seed: int
) -> None:
    method = DRM(direction, density=0.4)
    if direction == "horizontal":
        Q = rotation(deltas[0].shape[0], seed)
        rotated = Q.T @ method.merge([Q @ delta for delta in deltas])
    else:
        Q = rotation(deltas[0].shape[1], seed)
        rotated = method.merge([delta @ Q for delta in deltas]) @ Q.T
    assert close(rotated, method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks(), method=st.sampled_from(ROTATIONAL), seed=st.integers(0, 2**31))
def test_spectral_methods_commute_with_all_rotations(deltas: list[torch.Tensor], method: Method, seed: int) -> None:
    Q, W = rotation(deltas[0].shape[0], seed), rotation(deltas[0].shape[1], seed + 1)
    rotated = Q.T @ method.merge([Q @ delta @ W for delta in deltas]) @ W.T
    assert close(rotated, method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks())
def test_vertical_is_horizontal_on_the_transposed(deltas: list[torch.Tensor]) -> None:
    method = DRM("vertical")
    assert close(method.merge(deltas), DRM().merge([delta.T for delta in deltas]).T, method, deltas)


@SETTINGS
@given(
    deltas=tasks(max_tasks=1),
    method=st.sampled_from(
        [
            DRM(density=1.0, rank_tol=0.0),
            DRM("vertical", density=1.0, rank_tol=0.0),
            TIES(1.0),
            DARETIES(1.0),
            TSVM(),
            KnOTS(1.0),
        ]
    ),
)
def test_one_task_with_everything_kept_is_returned(deltas: list[torch.Tensor], method: Method) -> None:
    assert close(method.merge(deltas), deltas[0], method, deltas)


@SETTINGS
@given(deltas=tasks(), direction=DIRECTIONS, position=st.integers(0, 5))
def test_task_without_change_leaves_the_joint_directions(
    deltas: list[torch.Tensor], direction: str, position: int
) -> None:
    """With everything kept and a disjoint average, a task of zeros takes no part at all."""
    method = DRM(direction, density=1.0)
    padded = [*deltas[:position], torch.zeros_like(deltas[0]), *deltas[position:]]
    assert close(method.merge(padded), method.merge(deltas), method, deltas)


@SETTINGS
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), num_tasks=st.integers(1, 4), method=METHODS)
def test_zero_deltas_give_zero(shape: tuple[int, int], num_tasks: int, method: Method) -> None:
    assert not method.merge([torch.zeros(shape)] * num_tasks).any()


@SETTINGS
@given(deltas=tasks(), method=SPECTRAL)
def test_factors_give_the_dense_result(deltas: list[torch.Tensor], method: Method) -> None:
    """Any matrix is a product with the identity, whatever its rank."""
    factors = [LowRank(delta, torch.eye(delta.shape[1], dtype=delta.dtype)) for delta in deltas]
    assert close(method.merge_low_rank(factors).dense(), method.merge(deltas), method, deltas)


@SETTINGS
@given(deltas=tasks(), method=st.sampled_from([KnOTS(0.4), KnOTS(0.4, scaled=False)]), seed=st.integers(0, 2**31))
def test_knots_commutes_with_rotations_of_the_rows(deltas: list[torch.Tensor], method: Method, seed: int) -> None:
    Q = rotation(deltas[0].shape[0], seed)
    assert close(Q.T @ method.merge([Q @ delta for delta in deltas]), method.merge(deltas), method, deltas)


@SETTINGS
@given(tasks(), st.integers(0, 2**31), st.sampled_from(LINEAR))
def test_a_linear_method_is_the_sum_of_its_parts(deltas, seed, method):
    g = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(len(deltas), generator=g, dtype=torch.float64).tolist()
    ones = [[float(task == other) for other in range(len(deltas))] for task in range(len(deltas))]
    parts = [value * method.merge(deltas, one) for value, one in zip(coefficients, ones, strict=True)]
    whole = method.merge(deltas, coefficients)
    assert torch.linalg.norm(sum(parts) - whole) <= 1e-10 * torch.linalg.norm(torch.stack(parts)) + 1e-12


def test_methods_that_are_not_linear_say_so():
    g = torch.Generator().manual_seed(0)
    deltas = [torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    for method in (IsoC(), IsoCTS(), SVC(TaskArithmetic())):
        assert not method.linear
        parts = method.merge(deltas, [1.0, 0.0]) + method.merge(deltas, [0.0, 1.0])
        whole = method.merge(deltas)
        assert torch.linalg.norm(parts - whole) > 0.1 * torch.linalg.norm(whole)
