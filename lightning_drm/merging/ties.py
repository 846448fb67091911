"""TIES-Merging (arXiv 2306.01708): trim small entries, elect signs, average what agrees.

1. **Trim**: each task's entries strictly below its k-th smallest magnitude become zero, with L entries and
   k = L − round(L · density).
2. **Elect** a sign for each position by mass, and 3. **average disjointly**: `elect_and_average`.

As in the original code, the threshold is taken over a task's whole task vector, the vote does not see the coefficients,
and the average divides by the number of agreeing tasks. Where a sum is exactly 0, its entries are dropped; the original
code takes the model-wide majority sign there. The threshold over a whole model is found by streaming its parameters
twice past one histogram for each task; the flattened task vector never exists.

In core space (arXiv 2509.17786) the same is done to the entries of the cores of low-rank deltas, and a task's threshold
is taken over its cores in the whole model; `core_space.py` has the algorithm. This is another method than TIES on
entries: it gives another result, of low rank. While it is calibrated, the cores of the whole model are in memory: about
N R / (m + n) times as many numbers as the adapters have, for R the sum of N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.core_space import CoreSpaceMethod, Space
from lightning_drm.merging.election import elect_and_average, slice_size
from lightning_drm.merging.inputs import check_thresholds, choice, finite, fraction, refuse
from lightning_drm.merging.linalg.selection import TIE, Reduce, identity, prune_each, thresholds
from lightning_drm.merging.low_rank import Delta

Scope = Literal["global", "tensor"]


class TIES(CoreSpaceMethod):
    r"""TIES-Merging: keep each task's largest entries, elect a sign at each position, average the entries that agree.

    .. math:: s = \mathrm{sgn} \sum_t \hat\tau_t, \qquad A = \{t : \mathrm{sgn}\, \hat\tau_t = s \ne 0\}, \qquad
        \tau = \frac{\mathrm{scale}}{\max(1, |A|)} \sum_{t \in A} \lambda_t \hat\tau_t

    Here :math:`\hat\tau_t` is task t's delta after trimming (Algorithm 1; elect and merge are section 3.2).

    Args:
        density: Fraction of entries to keep, in (0, 1]; the paper's top-k %.
        scope: What the threshold is taken over: "global", a task's whole task vector (see `calibrate`), or "tensor",
            one parameter of it.
        scale: Factor on the merged delta; the paper's λ. The coefficients are one λ for each task.
        space: What is merged entry by entry: "entries", the deltas themselves, or "core", the cores of low-rank deltas,
            so that the result is low-rank too: another method, for matrices.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        With 4 entries and density 0.5, the threshold is the second smallest magnitude: 1 and 2. At the second position
        the sum is −4, so 1 is dropped.

        >>> deltas = [torch.tensor([4.0, 1.0, -3.0, 0.5]), torch.tensor([2.0, -5.0, 1.0, 6.0])]
        >>> TIES(density=0.5).merge(deltas)
        tensor([ 3., -5., -3.,  6.])

        In core space, a merged LoRA delta is one again.

        >>> from lightning_drm import LowRank
        >>> deltas = [LowRank(torch.ones(4, 1), torch.ones(1, 3)), LowRank(torch.eye(4)[:, :1], torch.eye(3)[:1])]
        >>> TIES(space="core").merge_low_rank(deltas).rank
        2
    """

    linear = True
    not_low_rank = "trimming single entries leaves a matrix of full rank, which space='core' avoids"

    def __init__(
        self, density: float = 0.2, scope: Scope = "global", scale: float = 1.0, space: Space = "entries"
    ) -> None:
        refuse(
            "TIES",
            [
                fraction("density", density, zero=False, one=True),
                choice("scope", scope, get_args(Scope)),
                finite("scale", scale),
                choice("space", space, get_args(Space)),
            ],
        )
        self.density = density
        self.scope = scope
        self.scale = scale
        self.thresholds: tuple[float, ...] | None = None
        self._choose(space)

    @property
    @override
    def works_in_pieces(self) -> bool:
        """Whether entries are those of the deltas, and thresholds not those of single tensors."""
        return self.elementwise and (self.scope == "global" or self.density == 1)

    def calibrate(
        self,
        stream: Callable[[], Iterable[Sequence[Delta]]],
        *,
        reduce: Reduce = identity,
        num_tasks: int | None = None,
    ) -> Self:
        """Find each task's threshold over its whole task vector, in the memory of one parameter and a histogram.

        The arguments are those of `Method.calibrate`. The stream is called once for each pass (two for data up to
        float32), and for its first item where `num_tasks` is not given.

        Returns:
            A copy with the thresholds fixed; for scope "tensor", this object.

        Raises:
            ValueError: If the stream yields deltas that `merge` would refuse.
        """
        if self.scope == "tensor":
            return self

        def entries() -> Iterator[list[Tensor]]:
            for deltas in stream():
                yield self._entries(self._check(deltas, None)[0])

        with torch.no_grad():
            # Cores are small, and taking them once more would cost more than counting them.
            cores = list(entries()) if self.space == "core" else None

            def passes() -> Iterable[list[Tensor]]:
                return entries() if cores is None else cores

            count = num_tasks or len(next(iter(passes()), ()))
            return self._with(thresholds=thresholds(passes, self.density, num_tasks=count, reduce=reduce))

    def _merge_entries(self, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        limits: Sequence[float] | None = self.thresholds
        if limits is None:
            limits = thresholds(lambda: [deltas], self.density, num_tasks=len(deltas))
        check_thresholds("TIES", limits, len(deltas))
        if self.space == "core":
            limits = [limit * (1 - TIE) for limit in limits]
        flat = [delta.flatten() for delta in deltas]
        merged = torch.empty_like(flat[0])
        size = slice_size(len(deltas), merged.device)
        for start in range(0, merged.numel(), size):
            part = slice(start, start + size)
            merged[part] = elect_and_average(prune_each([delta[part] for delta in flat], limits), coefficients)
        return merged.mul_(self.scale).view(deltas[0].shape)
