"""The arithmetic of a merge: IEEE float32, whatever the process has chosen for its training.

`torch.set_float32_matmul_precision("high")`, which Lightning recommends on GPUs with TensorFloat32, rounds the factors
of a product to 10 bits. A training forgives that; a merge would be off by several per cent, as it subtracts, compares
and divides what it has multiplied. Autocast rounds them to 7 bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # made at import

_lock = threading.Lock()
_users = 0
_found: list[str] = []


@contextmanager
def ieee_arithmetic(device: torch.device) -> Iterator[None]:
    """Within, products of float32 are those of IEEE float32, and no gradients are recorded.

    The precision belongs to the process: the first thread that enters sets it, and the last one that leaves puts back
    what was found.

    Args:
        device: Where the products are computed.
    """
    global _users, _found
    with _lock:
        if not _users:
            _found = [matmul.fp32_precision for matmul in _MATMULS]
            _set(["ieee"] * len(_MATMULS))
        _users += 1
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set(_found)


def _set(precisions: list[str]) -> None:
    for matmul, precision in zip(_MATMULS, precisions, strict=True):
        matmul.fp32_precision = precision
