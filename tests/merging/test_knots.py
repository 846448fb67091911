"""KnOTS over a whole model, and prepared; `test_reference.py` has it on single matrices of every kind."""

import pytest
import torch
from torch import Tensor

from helpers import reference
from helpers.devices import allowed, on
from lightning_drm.merging import DRM, TIES, KnOTS, LowRank
from merging.test_reference import dense, error, low_rank

MODEL = ([*dense((12, 20), 3)], low_rank((30, 14), (4, 2, 3)), [*dense((25, 6), 3, seed=1)])
COEFFICIENTS = [1.0, 0.5, 2.0]


def products(deltas) -> list[Tensor]:
    return [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]


def whole_model(model, density: float, scaled: bool) -> list[Tensor]:
    """Plain KnOTS with one threshold per task for all parameters."""
    spaces = [reference.knots_entries(products(deltas), scaled) for deltas in model]
    sizes = [entries[0].numel() for entries, _ in spaces]
    whole = [torch.cat([entries[task].flatten() for entries, _ in spaces]) for task in range(3)]
    trimmed = [reference.trim(values, density, 1e-10).split(sizes) for values in whole]
    return [
        back @ reference.elect_and_average(torch.stack([t[place].view(e[0].shape) for t in trimmed]), COEFFICIENTS)
        for place, (e, back) in enumerate(spaces)
    ]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_the_threshold_is_that_of_the_whole_model(density: float, scaled: bool, device: torch.device):
    ready = KnOTS(density, scaled).calibrate(lambda: (on(device, deltas) for deltas in MODEL))
    expected = whole_model(MODEL, density, scaled)
    for deltas, plain in zip(MODEL, expected, strict=True):
        assert error(ready.merge(on(device, deltas), COEFFICIENTS).cpu(), plain) < 1e-10
    alone = [KnOTS(density, scaled).merge(deltas, COEFFICIENTS) for deltas in MODEL]
    differ = any(error(merged, plain) > 0.01 for merged, plain in zip(alone, expected, strict=True))
    assert differ == (density < 1), "a matrix alone has a threshold of its own"


@pytest.mark.parametrize("scaled", [True, False])
def test_parameters_of_all_sizes_share_a_threshold(scaled: bool, device: torch.device):
    """Bases are kept near 1, apart from a power of two; float32 cannot hold the squares of either."""
    sizes = [1e-25, 1e20, 1.0]
    model = [[(delta * size).float() for delta in products(part)] for part, size in zip(MODEL, sizes, strict=True)]
    ready = KnOTS(0.2, scaled).calibrate(lambda: (on(device, deltas) for deltas in model))
    exact = [[delta.double() for delta in deltas] for deltas in model]
    expected = whole_model(exact, 0.2, scaled)
    for deltas, plain, size in zip(model, expected, sizes, strict=True):
        merged = ready.merge(on(device, deltas), COEFFICIENTS).double().cpu()
        assert float((merged - plain).norm()) < allowed(1e-5, ready, torch.float32, device) * size
    assert all(plain.any() for plain in expected) == (not scaled), "the case shows nothing"


def test_unscaled_it_is_drm_without_renormalization():
    """As Core Space's authors have it; but for the singular values up to 1e-5."""
    same = DRM(density=0.3, renormalize=False, prune="individual", rank_tol=1e-5)
    for deltas in MODEL:
        assert error(KnOTS(0.3, scaled=False).merge(deltas), same.merge(deltas)) < 1e-13


def test_a_direction_of_a_hundred_thousandth_is_dropped_whatever_the_size():
    U, _, Vh = torch.linalg.svd(dense((6, 9), 1)[0], full_matrices=False)
    values = torch.tensor([1.0, 0.5, 0.1, 1e-3, 2e-5, 5e-6], dtype=torch.float64)
    for size in (1e-12, 1.0, 1e12):
        merged = KnOTS(1.0).merge([size * (U * values) @ Vh])
        kept = torch.where(values > 1e-5, values, 0.0)
        assert float((merged / size - (U * kept) @ Vh).abs().max()) < 1e-13


@pytest.mark.parametrize("scaled", [True, False])
def test_one_basis_serves_every_setting(scaled: bool, device: torch.device):
    model = [on(device, deltas) for deltas in MODEL]
    for deltas in model:
        basis = KnOTS().prepare(deltas)
        method = KnOTS(0.6, scaled, 1.3)
        merged = method.merge_prepared(basis, COEFFICIENTS).dense()
        assert torch.equal(merged, method.merge(deltas, COEFFICIENTS))
        assert KnOTS(0.1).preparation == method.preparation
    prepared = [KnOTS().prepare(deltas) for deltas in model]
    ready = KnOTS(0.6, scaled).calibrate_prepared(lambda: iter(prepared))
    assert ready == KnOTS(0.6, scaled).calibrate(lambda: iter(model))


def test_ranks_sum_what_they_count():
    """A rank that counts nothing itself gets the thresholds by what the other one adds."""
    counted: list[Tensor] = []

    def keep(histogram: Tensor) -> Tensor:
        counted.append(histogram.clone())
        return histogram

    whole = KnOTS(0.3).calibrate(lambda: iter(MODEL), reduce=keep)
    others = iter(counted)
    idle = KnOTS(0.3).calibrate(lambda: iter(()), reduce=lambda mine: mine + next(others), num_tasks=3)
    assert idle.thresholds == whole.thresholds
    assert next(others, None) is None


def test_it_is_another_method_than_ties():
    deltas = MODEL[1]
    assert error(KnOTS(0.3).merge(deltas), TIES(0.3).merge(deltas)) > 0.1


def test_mistakes():
    with pytest.raises(ValueError, match=r"^KnOTS: density must be in \(0, 1\], got 0; scale must be a finite number"):
        KnOTS(0, scale=float("inf"))
    with pytest.raises(ValueError, match="KnOTS was calibrated on 3 tasks, got 2 deltas"):
        KnOTS().calibrate(lambda: iter(MODEL)).merge(MODEL[0][:2])
    with pytest.raises(ValueError, match="KnOTS: 3 deltas need 3 coefficients, got 1"):
        KnOTS().merge_prepared(KnOTS().prepare(MODEL[0]), [1.0])
    with pytest.raises(ValueError, match="KnOTS merges matrices only"):
        KnOTS().calibrate(lambda: [[torch.ones(3)]])
