"""Task arithmetic and averaging: weighted sums, the baselines that every other method is measured against."""

from __future__ import annotations

from collections.abc import Sequence

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
    r"""Task arithmetic (arXiv 2212.04089): the weighted sum of the deltas.

    .. math:: D = \mathrm{scale} \cdot \sum_t \lambda_t D_t

    Args:
        scale: Factor on the sum, shared by all tasks; the paper's λ. The coefficients are a further one for each task.

    Raises:
        ValueError: If `scale` is not finite.

    Example:
        >>> TaskArithmetic(scale=0.5).merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])])
        tensor([ 2., -1.])
    """

    elementwise = True
    linear = True
    works_in_pieces = True

    def __init__(self, scale: float = 0.4) -> None:
        refuse("TaskArithmetic", [finite("scale", scale)])
        self.scale = scale

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return weighted_sum(deltas, [self.scale * value for value in coefficients])

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        return weighted_sum_low_rank(deltas, [self.scale * value for value in coefficients])


class Average(Method):
    r"""The mean of the tasks; with every coefficient 1, the mean of the finetuned weights.

    .. math:: D = \frac{1}{N} \sum_t \lambda_t D_t

    Example:
        >>> Average().merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])])
        tensor([ 2., -1.])
    """

    elementwise = True
    linear = True
    works_in_pieces = True

    def __init__(self) -> None:
        self.scale = 1.0

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        return weighted_sum(deltas, [value / len(deltas) for value in coefficients])

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        return weighted_sum_low_rank(deltas, [value / len(deltas) for value in coefficients])
