"""Every method, on every kind of input, against the plain float64 loops in tests/helpers/reference.py."""

import pytest
import torch

from helpers import reference, ties
from helpers.devices import CPU, allowed, on
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
    TaskArithmetic,
)

SHAPES = [(12, 20), (20, 12), (16, 16), (60, 7), (7, 60), (1, 9), (9, 1), (1, 1)]
PAIRS = {
    "drm_h": (DRM(density=0.3), lambda d, c: reference.drm(d, c, density=0.3)),
    "drm_v": (DRM("vertical", density=0.3), lambda d, c: reference.drm(d, c, "vertical", density=0.3)),
    "drm_loose": (DRM(rank_tol=0.3, density=0.5), lambda d, c: reference.drm(d, c, rank_tol=0.3, density=0.5)),
    "drm_drop": (DRM(rank_drop=0.4), lambda d, c: reference.drm(d, c, rank_drop=0.4)),
    "drm_raw": (DRM(renormalize=False), lambda d, c: reference.drm(d, c, renormalize=False)),
    "drm_individual": (DRM(prune="individual"), lambda d, c: reference.drm(d, c, prune="individual")),
    "drm_all_signs": (DRM(elect_sign=False), lambda d, c: reference.drm(d, c, elect_sign=False)),
    "drm_plain_mean": (DRM(disjoint=False), lambda d, c: reference.drm(d, c, disjoint=False)),
    "drm_dense": (DRM(density=1.0, scale=1.7), lambda d, c: reference.drm(d, c, density=1.0, scale=1.7)),
    "drm_bare": (
        DRM("vertical", 0.4, 1e-2, 0.2, False, "individual", False, False, 0.5),
        lambda d, c: reference.drm(d, c, "vertical", 0.4, 1e-2, 0.2, False, "individual", False, False, 0.5),
    ),
    "ties": (TIES(0.3, "tensor", 1.2), lambda d, c: reference.ties(d, c, 0.3, 1.2)),
    "ties_global": (TIES(0.3), lambda d, c: reference.ties(d, c, 0.3)),
    "dare_dense": (DARETIES(density=1.0), lambda d, c: reference.ties(d, c, 1.0)),
    "knots": (KnOTS(0.3, scale=1.2), lambda d, c: reference.knots(d, c, 0.3, scale=1.2)),
    "knots_unscaled": (KnOTS(0.3, scaled=False), lambda d, c: reference.knots(d, c, 0.3, scaled=False)),
    "knots_dense": (KnOTS(1.0), lambda d, c: reference.knots(d, c, 1.0)),
    "task_arithmetic": (TaskArithmetic(0.7), lambda d, c: reference.task_arithmetic(d, c, 0.7)),
    "average": (Average(), reference.average),
    "iso_c": (IsoC(1.3), lambda d, c: reference.iso_c(d, c, 1.3)),
    "iso_cts": (IsoCTS(0.6, 1.3), lambda d, c: reference.iso_cts(d, c, 0.6, 1.3)),
    "iso_cts_own": (IsoCTS(0.0), lambda d, c: reference.iso_cts(d, c, 0.0)),
    "tsv_m": (TSVM(1.3), lambda d, c: reference.tsv_m(d, c, 1.3)),
    "wudi": (WUDI(0.2, 1.3), lambda d, c: reference.wudi(d, c, 0.2, 1.3)),
    "wudi_exact": (WUDI(0.0), lambda d, c: reference.wudi(d, c, 0.0)),
    "dc_merge": (DCMerge(0.2, scale=1.3), lambda d, c: reference.dc_merge(d, c, 0.2, scale=1.3)),
    "dc_merge_line": (DCMerge(0.3, 2, "linear"), lambda d, c: reference.dc_merge(d, c, 0.3, 2, "linear")),
    "svc": (SVC(TaskArithmetic(0.7)), lambda d, c: reference.svc(d, reference.task_arithmetic(d, c, 0.7), c)),
    "svc_tsv": (SVC(TSVM(), 0.6), lambda d, c: reference.svc(d, reference.tsv_m(d, c), c, 0.6)),
    "star": (STAR(60.0, 1.3), lambda d, c: reference.star(d, c, 60.0, 1.3)),
}
LOW_RANK = [name for name, (method, _) in PAIRS.items() if method.supports_low_rank]


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed))


def dense(shape, num_tasks, seed=0, dtype=torch.float64):
    """Deltas with a part in common and different sizes, as finetuned weights have."""
    g = generator(seed, *shape, num_tasks)
    common = torch.randn(shape, generator=g, dtype=torch.float64)
    return [
        ((0.5 + 0.5 * task) * (0.5 * common + torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)
        for task in range(num_tasks)
    ]


def low_rank(shape, ranks, seed=0, dtype=torch.float64):
    g = generator(seed, *shape, *ranks)
    return [
        LowRank(
            torch.randn(shape[0], rank, generator=g, dtype=dtype), torch.randn(rank, shape[1], generator=g, dtype=dtype)
        )
        for rank in ranks
    ]


def error(merged, expected):
    return float(torch.linalg.norm(merged.double() - expected) / torch.linalg.norm(expected).clamp(min=1e-30))


def bound(method, dtype, device=CPU):
    """Largest relative error that the precision explains."""
    return allowed(_on_cpu(method, dtype), method, dtype, device)


def _on_cpu(method, dtype):
    eps = torch.finfo(dtype).eps
    if method.elementwise:
        return 4 * eps
    if isinstance(method, DRM | KnOTS):  # singular values down to 1 % of the largest, come from squares
        return 8 * eps if dtype == torch.float32 else eps / 1e-2**2
    return 2e-5 if dtype == torch.float32 else 1e-9  # the polar factors of bases that are nearly dependent


def check(name, deltas, coefficients=None, *, merged=None, device=CPU):
    """Compare a merge, by default that of `merge`, with the reference, but for entries that rounding decides.

    It is merged on the device, and compared on the CPU.
    """
    method, plain = PAIRS[name]
    if merged is None:
        merged = method.merge(on(device, deltas), coefficients)
    assert merged.device.type == device.type
    dense = [delta.dense() if isinstance(delta, LowRank) else delta.detach() for delta in deltas]
    found = merged.cpu()
    expected = ties.settled(found, plain(dense, coefficients), method, dense)
    assert error(found, expected) < bound(method, merged.dtype, device)
    return merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_dense(name, num_tasks, shape, device):
    deltas = dense(shape, num_tasks)
    coefficients = [1.0 - 0.15 * task for task in range(num_tasks)]
    for weights in (None, coefficients):
        merged = check(name, deltas, weights, device=device)
        assert merged.shape == shape
        assert merged.dtype == torch.float64
        assert merged.is_contiguous()


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("shape", [(30, 42), (42, 30), (9, 40)])
@pytest.mark.parametrize("ranks", [(3,), (2, 2), (4, 1, 3), (3, 0, 2)])
def test_low_rank_is_the_dense_result(name, shape, ranks, device):
    method, _ = PAIRS[name]
    deltas = low_rank(shape, ranks)
    coefficients = [1.0 - 0.15 * task for task in range(len(ranks))]
    merged = method.merge_low_rank(on(device, deltas), coefficients)
    assert merged.shape == shape
    assert merged.rank <= sum(ranks)
    check(name, deltas, coefficients, merged=merged.dense(), device=device)
    assert error(method.merge(on(device, deltas), coefficients), merged.dense()) < 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_mixed_inputs(name, device):
    check(name, [low_rank((14, 18), (3,))[0], *dense((14, 18), 2)], device=device)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(name, dtype, device):
    merged = check(name, [delta.to(dtype) for delta in dense((16, 24), 3)], device=device)
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("name", PAIRS)
def test_single_precision(name, device):
    merged = check(name, dense((40, 64), 4, dtype=torch.float32), device=device)
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("name", PAIRS)
def test_views_are_merged_and_left_alone(name, device):
    deltas = [delta.T for delta in on(device, dense((24, 15), 3))]
    before = [delta.clone() for delta in deltas]
    merged = PAIRS[name][0].merge(deltas)
    check(name, on(CPU, before), merged=merged, device=device)
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True))


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_are_left_alone(name, device):
    method, _ = PAIRS[name]
    deltas = on(device, low_rank((12, 10), (2, 3)))
    before = [(delta.up.clone(), delta.down.clone()) for delta in deltas]
    method.merge_low_rank(deltas, [0.5, 2.0])
    for delta, (up, down) in zip(deltas, before, strict=True):
        assert torch.equal(delta.up, up)
        assert torch.equal(delta.down, down)


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_that_require_gradients(name):
    merged = check(name, [delta.requires_grad_() for delta in dense((8, 10), 2)])
    assert not merged.requires_grad


@pytest.mark.parametrize("shape", [(13,), (2, 3, 4, 5), ()])
@pytest.mark.parametrize("name", ["ties", "dare_dense", "task_arithmetic", "average"])
def test_elementwise_methods_take_any_dimensions(name, shape, device):
    assert PAIRS[name][0].elementwise
    check(name, dense(shape, 3), device=device)


def test_larger_than_one_slice(device):
    """More rows than fit into one slice, and more than one strip of the Gram matrix."""
    deltas = dense((500, 300), 4)
    for name in ("drm_h", "drm_v", "drm_individual", "ties", "iso_c"):
        check(name, deltas, [1, 0.5, 2, 1], device=device)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_a_tall_layer_is_merged_as_by_the_svd_in_doubles(direction, device):
    """A basis of more than a thousand directions, in single precision."""
    g = torch.Generator().manual_seed(0)
    shape = (1100, 400) if direction == "horizontal" else (400, 1100)
    deltas = [torch.randn(shape, generator=g) * torch.linspace(1, 0.1, shape[1]) for _ in range(3)]
    method = DRM(direction)
    merged = method.merge(on(device, deltas)).cpu()
    expected = ties.settled(merged, reference.drm(deltas, None, direction), method, deltas)
    lines = 0 if direction == "horizontal" else 1  # what an entry of the basis feeds: columns, or rows
    errors = torch.linalg.norm(merged.double() - expected, dim=lines) / torch.linalg.norm(expected, dim=lines)
    assert errors.max() < allowed(16 * torch.finfo(torch.float32).eps, method, torch.float32, device)


def test_the_default_dtype_changes_nothing():
    deltas = dense((40, 30), 2, dtype=torch.float32)
    expected = DRM().merge(deltas)
    torch.set_default_dtype(torch.float64)
    try:
        found = DRM().merge(deltas)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("renormalize", [True, False])
def test_weak_directions_in_single_precision_stay_finite(renormalize, device):
    """Singular values down to what float32 resolves, none of them dropped on purpose."""
    U, _, Vh = torch.linalg.svd(dense((40, 60), 1)[0], full_matrices=False)
    delta = (U * torch.logspace(0, -9, 40, dtype=torch.float64) @ Vh).float()
    merged = DRM(rank_tol=0.0, density=1.0, renormalize=renormalize).merge(on(device, [delta, delta])).cpu()
    torch.testing.assert_close(merged, delta, rtol=0, atol=1e-5)
