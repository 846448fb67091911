"""Deltas of any size that their precision holds: what is squared on the way neither overflows nor vanishes."""

import pytest
import torch
from torch import Tensor

from helpers import reference, ties
from helpers.devices import allowed, on
from lightning_drm.merging import DRM, TSVM, Average, IsoC, LowRank, Method, TaskArithmetic
from merging.test_reference import LOW_RANK, PAIRS, bound, dense, low_rank

FLOAT32, FLOAT64 = torch.float32, torch.float64
SIZES = [
    *[(FLOAT32, size) for size in (1e-30, 1e-22, 1e18, 1e36)],
    *[(FLOAT64, size) for size in (1e-290, 1e-160, 1e160, 1e290)],
]


def hold(merged: Tensor, name: str, deltas: list[Tensor]) -> None:
    """Compares with the float64 reference on the CPU, after both are divided by the largest expected entry."""
    (method, plain), device = PAIRS[name], merged.device
    merged = merged.cpu()
    doubles = [delta.double() for delta in deltas]
    unit = max(float(delta.abs().max()) for delta in doubles)
    scaled = [delta / unit for delta in doubles]  # the reference squares too
    expected = plain(scaled, None)
    ours = merged.double() / unit
    expected = ties.settled(ours.to(merged.dtype), expected, method, scaled)
    assert float((ours - expected).norm() / expected.norm()) <= bound(method, merged.dtype, device)


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_all_deltas_of_any_size(name: str, dtype: torch.dtype, size: float, device: torch.device):
    deltas = [delta.to(dtype) for delta in (part * size for part in dense((12, 20), 3))]
    hold(PAIRS[name][0].merge(on(device, deltas)), name, deltas)


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_of_any_size(name: str, dtype: torch.dtype, size: float, device: torch.device):
    factors = low_rank((12, 20), (2, 3, 4), dtype=FLOAT64)
    factors = [LowRank((delta.up * size).to(dtype), delta.down.to(dtype)) for delta in factors]
    doubles = [delta.up.double() @ delta.down.double() for delta in factors]
    hold(PAIRS[name][0].merge(on(device, factors)), name, doubles)
    hold(PAIRS[name][0].merge_low_rank(on(device, factors)).dense(), name, doubles)


def drm_by_projection(method: DRM, deltas: list[Tensor]) -> Tensor:
    """DRM in float64 with Σ V_tᵀ as Uᵀ D_t, which the right singular vectors of a stack cannot give for small tasks."""
    if method.direction == "vertical":
        return drm_by_projection(DRM(density=method.density), [delta.T for delta in deltas]).T
    U, S, _ = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    U = U[:, : reference.num_kept(S, method.rank_tol, 0.0)]
    rows = torch.stack([U.T @ delta for delta in deltas])
    lengths = rows.norm(dim=2, keepdim=True)
    pruned = reference.trim(rows / lengths, method.density) * lengths
    return U @ reference.elect_and_average(pruned, [1.0] * len(deltas))


@pytest.mark.parametrize("entry", [1e20, 1e25])
@pytest.mark.parametrize("method", [DRM(), DRM("vertical")], ids=repr)
def test_one_huge_entry_takes_nothing_else_away(method: DRM, entry: float, device: torch.device):
    deltas = dense((12, 20), 3, dtype=FLOAT32)
    deltas[1][3, 4] = entry
    merged = method.merge(on(device, deltas)).double().cpu()
    expected = drm_by_projection(method, [delta.double() for delta in deltas])
    assert float(expected.abs().max()) > entry / 4
    assert float((merged - expected).abs().max()) <= allowed(1e-6, method, FLOAT32, device) * float(
        expected.abs().max()
    )


@pytest.mark.parametrize("name", ["iso_c", "tsv_m", "task_arithmetic", "average", "ties"])
def test_one_huge_entry_in_other_methods(name: str):
    deltas = dense((12, 20), 3, dtype=FLOAT32)
    deltas[1][3, 4] = 1e20
    hold(PAIRS[name][0].merge(deltas), name, deltas)


@pytest.mark.parametrize("ratio", [1e-10, 1e-20, 1e-28])
@pytest.mark.parametrize("method", [DRM(density=0.3), DRM("vertical", density=0.5)], ids=repr)
def test_a_small_task_keeps_its_vote_beside_a_large_one(method: DRM, ratio: float, device: torch.device):
    deltas = dense((12, 20), 3, dtype=FLOAT32)
    deltas[2] *= ratio
    merged = method.merge(on(device, deltas)).double().cpu()
    expected = drm_by_projection(method, [delta.double() for delta in deltas])
    assert float((merged - expected).norm() / expected.norm()) <= bound(method, FLOAT32, device)
    without = drm_by_projection(method, [delta.double() for delta in deltas[:2]])
    assert float((without - expected).norm() / expected.norm()) > 0.1, "the case shows nothing"


@pytest.mark.parametrize("method", [DRM(), DRM("vertical"), IsoC(), TSVM()], ids=repr)
def test_a_task_that_its_precision_cannot_hold_beside_another_is_refused(method: Method, device: torch.device):
    deltas = dense((12, 20), 3, dtype=FLOAT32)
    deltas[1] *= 1e-32
    with pytest.raises(
        ValueError, match=r"delta of task 1 reaches \de-32, too little for float32 beside the . of task 2"
    ):
        method.merge(on(device, deltas))


@pytest.mark.parametrize("name", PAIRS)
def test_what_has_no_sum_is_refused(name: str):
    deltas = [torch.zeros(4, 4), torch.full((4, 4), 2e38), torch.zeros(4, 4)]
    with pytest.raises(ValueError, match=r"delta of task 1 reaches 2e\+38, too large for a sum of 3 in float32"):
        PAIRS[name][0].merge(deltas)


def test_a_result_beyond_the_precision_is_refused():
    with pytest.raises(ValueError, match=r"beyond float32; the largest one that went in is 1e\+37, of task 1"):
        TaskArithmetic(scale=100.0).merge([torch.ones(2, 2), torch.full((2, 2), 1e37)])
    with pytest.raises(ValueError, match="beyond float32"):
        IsoC().merge([torch.eye(2)], [1e39])
    assert Average().merge([torch.full((2, 2), 1e38)]).isfinite().all()


@pytest.mark.parametrize("coefficient", [1e-30, 1e25])
@pytest.mark.parametrize("name", PAIRS)
def test_coefficients_of_any_size(name: str, coefficient: float, device: torch.device):
    deltas = dense((12, 20), 3, dtype=FLOAT32)
    merged = PAIRS[name][0].merge(on(device, deltas), [coefficient] * 3)
    hold(merged / coefficient, name, deltas)
