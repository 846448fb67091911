r"""Fisher merging (arXiv 2111.09832): each entry is averaged with the weights of how much each task depends on it.

1. :math:`F_t`, a task's diagonal Fisher information: the mean over examples of
   :math:`\sum_y p(y|x)\,(\partial \log p(y|x))^2`, by the model's own probabilities, never the true labels.
2. :math:`w_t = \lambda_t \max(F_t, \epsilon) / \|F_t\|`, with the norm over the task's whole model, so that tasks of
   different sharpness count alike.
3. :math:`D = \sum_t w_t D_t / \sum_t w_t`, entry by entry.

What differs from the authors' code: all tasks are floored by ε, where theirs floors the first one only unless told
otherwise. A task without any Fisher information counts as one of norm 1, with ε everywhere. Coefficients are weights,
as in the paper: a factor on all of them changes nothing. Cost: one pass over deltas and statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_drm.merging.inputs import refuse, weights
from lightning_drm.merging.low_rank import densify
from lightning_drm.merging.method import Method
from lightning_drm.merging.scaling import near_one, times_power_
from lightning_drm.merging.statistics import Need


class Fisher(Method):
    r"""Fisher-weighted averaging.

    .. math:: D = \frac{\sum_t w_t D_t}{\sum_t w_t}, \qquad w_t = \lambda_t \frac{\max(F_t, \epsilon)}{\|F_t\|}

    It needs diagonal Fisher information (``statistics: [fisher]``). Where it is not said for the whole model, the norm
    is that of this parameter's.

    Args:
        floor: Floor ε of the Fisher information, above 0.

    Raises:
        ValueError: If the floor is out of range.

    Example:
        >>> from lightning_drm import Statistics
        >>> statistics = [Statistics(fisher=torch.tensor([3.0, 4.0])), Statistics(fisher=torch.tensor([4.0, 3.0]))]
        >>> Fisher().merge([torch.tensor([7.0, 7.0]), torch.zeros(2)], statistics=statistics)
        tensor([3., 4.])
    """

    elementwise: bool = True
    weighs: bool = True
    needs: Need | None = "fisher"
    not_low_rank: str = "its weights differ from entry to entry"

    def __init__(self, floor: float = 1e-6) -> None:
        refuse("Fisher", [None if 0 < floor < float("inf") else f"floor must be a number above 0, got {floor!r}"])
        self.floor = floor
        self.scale = 1.0

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        shares = weights("Fisher", coefficients)
        scaled, exponent = near_one(deltas)
        total = torch.zeros_like(deltas[0], dtype=torch.float64)
        merged = torch.zeros_like(total)
        for delta, share, one in zip(scaled, shares, self._statistics, strict=True):
            assert one.fisher is not None, "checked before"
            fisher = one.fisher.double()
            norm = one.fisher_norm if one.fisher_norm is not None else float(torch.linalg.vector_norm(fisher))
            weight = fisher.clamp(min=self.floor) * (share / (norm or 1.0))
            merged.addcmul_(weight, densify(delta).double())
            total += weight
        return times_power_(merged.div_(total), exponent).to(deltas[0].dtype)
