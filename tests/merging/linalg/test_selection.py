"""The exact threshold, against a sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_drm.merging.linalg import selection
from lightning_drm.merging.linalg.selection import prune, thresholds


def sorted_threshold(values: torch.Tensor, density: float) -> float:
    k = values.numel() - round(values.numel() * density)
    return float(values.abs().flatten().sort().values[k - 1]) if k else 0.0


def found(values: torch.Tensor, density: float) -> float:
    return thresholds(lambda: [[values]], density, num_tasks=1)[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    density=st.floats(0.001, 1.0),
)
def test_any_doubles(values, density):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert found(tensor, density) == sorted_threshold(tensor, density)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    density=st.floats(0.001, 1.0),
)
def test_any_singles(values, density):
    tensor = torch.tensor(values, dtype=torch.float32)
    assert found(tensor, density) == sorted_threshold(tensor, density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.999, 1.0])
def test_more_than_one_chunk(device, dtype, density):
    values = torch.randn(3 * selection.CHUNK + 17, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert found(values.to(device), density) == sorted_threshold(values, density)


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 2), (torch.float64, 4)])
def test_single_precision_needs_two_passes_double_needs_four(dtype, passes):
    calls = []
    values = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    thresholds(lambda: calls.append(1) or [[values]], 0.3, num_tasks=1)
    assert len(calls) == passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.999])
def test_what_accelerators_do(monkeypatch, dtype, density):
    """They count with tensors, in chunks of their own, here on the CPU."""
    monkeypatch.setattr(selection, "_on_host", lambda values: False)
    monkeypatch.setattr(selection, "DEVICE_CHUNK", 1 << 12)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, dtype=dtype, generator=generator).exp() for size in (9, 100_000)]
    limits = thresholds(lambda: [[one, one * 3] for one in values], density, num_tasks=2)
    assert limits[0] == sorted_threshold(torch.cat(values), density)
    assert limits[1] == sorted_threshold(torch.cat(values) * 3, density)


def test_ties_with_the_threshold_are_kept():
    values = torch.tensor([1.0, -2.0, 2.0, 3.0, 0.0])
    assert found(values, 0.4) == 2.0
    assert prune(values, 2.0).tolist() == [0.0, -2.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prune_copies(dtype):
    values = torch.tensor([0.1, -0.3, 0.2], dtype=dtype)
    before = values.clone()
    assert prune(values, float(values[2])).tolist() == [0.0, float(values[1]), float(values[2])]
    assert torch.equal(values, before)
    assert torch.equal(prune(values, 0.0), values)
