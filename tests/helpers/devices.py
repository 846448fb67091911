"""The devices that tests of merging run on: the CPU always, a GPU where there is one, which `pytest -m gpu` selects."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lightning_drm.merging import Delta, Method

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_GPU = torch.cuda.is_available()
DEVICES = [CPU, *([pytest.param(CUDA, marks=pytest.mark.gpu)] if HAS_GPU else [])]


needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")  # beside the mark `gpu`


def on(device: torch.device, deltas: Sequence[Delta]) -> list[Delta]:
    """Deltas on a device."""
    return [delta.to(device) for delta in deltas]


def allowed(bound: float, method: Method, dtype: torch.dtype, device: torch.device) -> float:
    """The relative error that a device may add to what the CPU is held to.

    In doubles it may add nothing. In float32, sums are added up in another order, and weak directions turn with it.
    """
    if device.type == "cpu" or dtype == torch.float64:
        return bound
    return max(bound, 1e-6 if method.elementwise else 3e-4)


def require_gpus(backend: str, count: int) -> None:
    """Skips a test whose processes meet by NCCL where there is not a GPU for each."""
    if backend == "nccl" and torch.cuda.device_count() < count:
        pytest.skip(f"NCCL wants a GPU for each of {count} processes, and there are {torch.cuda.device_count()}")
