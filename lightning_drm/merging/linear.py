"""Task arithmetic and averaging: weighted sums, the baselines every other method is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_drm.merging.inputs import finite, refuse
from lightning_drm.merging.low_rank import LowRank
from lightning_drm.merging.method import Method


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_t w_t D_t of N tensors of one shape, without a stacked copy."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def weighted_sum_low_rank(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ_t w_t D_t as factors: the factors side by side, of rank Σ rank."""
    ups = [delta.up * weight for delta, weight in zip(deltas, weights, strict=True)]
    return LowRank(torch.cat(ups, dim=1), torch.cat([delta.down for delta in deltas], dim=0))


class TaskArithmetic(Method):
    """Task arithmetic: the weighted sum of the deltas, `scale · Σ_t λ_t D_t` (arXiv 2212.04089, equation 3).

    Args:
        scale: Factor on the sum, shared by all tasks.

    Raises:
        ValueError: If `scale` is not finite.

    Example:
        >>> TaskArithmetic(scale=0.5).merge([torch.ones(2), 3 * torch.ones(2)])
        tensor([2., 2.])
    """

    elementwise: ClassVar[bool] = True
    works_in_pieces = True

    def __init__(self, scale: float = 0.4) -> None:
        refuse("TaskArithmetic", [finite("scale", scale)])
        self.scale = scale

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return weighted_sum(deltas, [self.scale * value for value in coefficients])

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        return weighted_sum_low_rank(deltas, [self.scale * value for value in coefficients])


class Average(Method):
    """The mean of the tasks, `Σ_t λ_t D_t / N`: with every λ = 1, the mean of the finetuned weights.

    Example:
        >>> Average().merge([torch.ones(2), 3 * torch.ones(2)])
        tensor([2., 2.])
    """

    elementwise: ClassVar[bool] = True
    works_in_pieces = True

    def __init__(self) -> None:
        self.scale = 1.0

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return weighted_sum(deltas, [value / len(deltas) for value in coefficients])

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        return weighted_sum_low_rank(deltas, [value / len(deltas) for value in coefficients])
