"""The matrix products of DRM, which nothing avoids, and PyTorch's float64 `eigh` of the smaller side, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Floor:
    """This work for deltas of one shape, with every buffer allocated beforehand.

    Products: the float64 Gram matrix of the stack's shorter side (as plain `S @ S.T`), the projection of every delta,
    and the reconstruction, both in the deltas' precision.
    """

    def __init__(self, deltas: Sequence[Tensor], direction: str) -> None:
        sides = [delta.T.contiguous() if direction == "vertical" else delta for delta in deltas]
        self._stack = torch.cat(sides, dim=1)
        self._double = self._stack.double()
        if self._stack.shape[0] > self._stack.shape[1]:
            self._double = self._double.T
        size = self._double.shape[0]
        self._gram = torch.empty(size, size, dtype=torch.float64)
        self._basis = torch.linalg.qr(torch.randn(len(self._stack), min(self._stack.shape)))[0].contiguous()
        self._rows = torch.empty(self._basis.shape[1], self._stack.shape[1])
        self._merged = torch.empty(sides[0].shape)

    def __call__(self) -> None:
        torch.mm(self._double, self._double.T, out=self._gram)
        torch.linalg.eigh(self._gram)
        torch.mm(self._basis.T, self._stack, out=self._rows)
        torch.mm(self._basis, self._rows[:, : self._merged.shape[1]], out=self._merged)
