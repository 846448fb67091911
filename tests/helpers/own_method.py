"""A user's own merging method and optimizer, which this package knows nothing of."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_drm.merging import Method


class Mixture(Method):
    """What two methods make, a share of each: arguments that are methods, by other names than those of a wrapper."""

    elementwise: ClassVar[bool] = True
    not_low_rank = "the methods inside may merge entries"

    def __init__(self, first: Method, second: Method, share: float = 0.5) -> None:
        self.first, self.second, self.share = first, second, share

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        one, other = (method.merge(deltas, coefficients) for method in (self.first, self.second))
        return self.share * one + (1 - self.share) * other


class Largest(Method):
    """Of each entry, the delta that is largest in magnitude; the parameters share names, not defaults, with DRM's."""

    elementwise: ClassVar[bool] = True
    not_low_rank = "the largest entry is not linear in the factors"

    def __init__(self, density: float = 0.75, scale: float = 0.25) -> None:
        self.density, self.scale = density, scale

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        weighted = torch.stack([delta * value for delta, value in zip(deltas, coefficients, strict=True)])
        return self.scale * weighted.gather(0, weighted.abs().argmax(0, keepdim=True))[0]
