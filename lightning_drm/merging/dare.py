"""DARE-TIES (arXiv 2311.03099): drop entries at random, rescale the rest, elect signs, average what agrees.

1. **Drop** each entry with probability p = 1 − density, and **rescale** the rest by 1 / (1 − p) = 1 / density.
2. **Elect** signs and **average disjointly**, as TIES does: `elect_and_average`.

Which entries are dropped depends only on the seed and the task's key: the key's hash starts a generator that can be
advanced at no cost, and numpy keeps its raw output stable across releases. So neither the order of parameters, nor the
device, nor the number of processes changes a merge.

In core space (arXiv 2509.17786) the same is done to the entries of the cores of low-rank deltas; `core_space.py` has
the algorithm. This is another method than DARE-TIES on entries: it gives another result, of low rank. A core's entries
are drawn in the order of its rows, from the strongest direction on, by the same seed and keys. The paper keeps 70 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.core_space import CoreSpaceMethod, Space
from lightning_drm.merging.draws import Draws
from lightning_drm.merging.election import elect_and_average, slice_size
from lightning_drm.merging.inputs import choice, finite, fraction, refuse


class DARETIES(CoreSpaceMethod):
    r"""DARE-TIES: keep each entry with probability `density`, rescale, then TIES' sign election and disjoint average.

    .. math:: \hat D_t = \frac{M_t \odot D_t}{1 - p}, \qquad M_t \sim \mathrm{Bernoulli}(1 - p), \qquad
        D = \mathrm{scale} \cdot \mathrm{elect\_and\_average}_t(\hat D_t)

    Args:
        density: Probability of keeping an entry, in (0, 1]; 1 − p in the paper, p being the drop rate.
        seed: Start of the random draws, together with each task's key; see `keyed`.
        scale: Factor on the merged delta.
        space: What is merged entry by entry: "entries", the deltas themselves, or "core", the cores of low-rank deltas,
            so that the result is low-rank too: another method, for matrices.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        With everything kept, the second position has the sum 1, so −1 is dropped. With half, what is kept doubles.

        >>> DARETIES(density=1.0).merge([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])])
        tensor([2., 2.])
        >>> DARETIES(density=0.5).merge([torch.ones(100)]).unique()
        tensor([0., 2.])
    """

    linear = True
    not_low_rank = "dropping single entries leaves a matrix of full rank, which space='core' avoids"

    def __init__(self, density: float = 0.2, seed: int = 0, scale: float = 1.0, space: Space = "entries") -> None:
        refuse(
            "DARETIES",
            [
                fraction("density", density, zero=False, one=True),
                finite("scale", scale),
                choice("space", space, get_args(Space)),
            ],
        )
        self.density = density
        self.seed = seed
        self.scale = scale
        self.keys: tuple[str, ...] | None = None
        self.start = 0
        self._choose(space)

    @property
    @override
    def works_in_pieces(self) -> bool:
        """Whether entries are those of the deltas."""
        return self.elementwise

    def keyed(self, keys: Sequence[str], *, start: int = 0) -> Self:
        """A copy whose draws for task i depend on the seed and `keys[i]` only; without it, keys are "0", "1", …."""
        return self._with(keys=tuple(keys), start=start)

    def _merge_entries(self, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        keys = self.keys or tuple(str(task) for task in range(len(deltas)))
        if len(keys) != len(deltas):
            raise ValueError(f"DARETIES has keys for {len(keys)} tasks, got {len(deltas)} deltas")
        flat = [delta.flatten() for delta in deltas]
        draws = [Draws(self.seed, key, self.density, self.start) for key in keys]
        merged = torch.empty_like(flat[0])
        size = slice_size(len(deltas), merged.device)
        for start in range(0, merged.numel(), size):
            parts = [delta[start : start + size] for delta in flat]
            stack = torch.empty(len(parts), len(parts[0]), dtype=merged.dtype, device=merged.device)
            for row, part, draw in zip(stack, parts, draws, strict=True):
                drop(part, draw, out=row)
            merged[start : start + size] = elect_and_average(stack, coefficients)
        return merged.mul_(self.scale / self.density).view(deltas[0].shape)


def drop(values: Tensor, draws: Draws, out: Tensor) -> None:
    """Copy `values`, with zeros where the next draws drop an entry; their number is even but for the last call."""
    if values.device.type == "cpu":
        np.multiply(values.numpy(), draws.kept(len(values)), out=out.numpy())  # torch would make the mask floats first
    else:
        torch.mul(values, draws.kept_on(values.device, len(values)), out=out)
