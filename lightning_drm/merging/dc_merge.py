r"""DC-Merge (arXiv 2603.06242): tasks meet in a space where their directions are orthogonal, and vote there.

1. Of each task, take the top k singular triplets :math:`U_t, \sigma_t, V_t`.
2. Optionally even out the singular values (`smoothing`), as the paper does for LoRA.
3. Make all tasks' left vectors orthogonal to each other, and all right ones:
   :math:`P = \mathrm{polar}([U_1 \cdots U_N])`, :math:`Q = \mathrm{polar}([V_1 \cdots V_N])`. In these bases a task is
   :math:`M_t = P^T U_t\, \mathrm{diag}(\sigma_t)\, V_t^T Q`.
4. Of each :math:`M_t`, keep the :math:`\max(1, \lfloor \mathrm{density} \cdot s^2 \rfloor)` largest entries.
5. Elect signs and average what agrees, as TIES does.
6. Keep only the N diagonal blocks, in which each task's directions stand for themselves, and go back: :math:`P M Q^T`.

As in the authors' code, s is the shorter side of a weight that is finetuned in full, where
:math:`k = \lfloor \min(m, n) / N \rfloor`, and N k for LoRA, where k is its rank. Here a rank below
:math:`\lfloor \min(m, n) / N \rfloor` shows by itself, from the singular values, so that a delta is merged alike as a
matrix and as factors; and k is never above that, as more directions than there is room for have no orthogonal basis.
The paper's abstract smooths always, its code only LoRA; here `smoothing` says it. The paper has
no coefficients; here they weigh the average, as in TIES. Cost: N + 2 SVDs and the election on N matrices (N k, N k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_drm.merging.election import elect_and_average
from lightning_drm.merging.inputs import choice, finite, fraction, refuse
from lightning_drm.merging.linalg.polar import orthogonalize
from lightning_drm.merging.linalg.spectral import join, thin_svd
from lightning_drm.merging.rotational import RotationalMethod

Smoothing = Literal["none", "average", "linear"]


class DCMerge(RotationalMethod):
    r"""DC-Merge: entries of highest magnitude, in orthogonal bases of all tasks' directions, elected and averaged.

    .. math:: D = \alpha\, P \Big(B \odot \mathrm{elect}\big(\mathrm{top}(M_1), …, \mathrm{top}(M_N)\big)\Big) Q^T,
        \qquad M_t = P^T U_t\, \mathrm{diag}(\sigma_t)\, V_t^T Q

    B is 1 in the N diagonal blocks and 0 elsewhere. With more tasks than min(m, n), no task has a whole direction to
    itself and the merged delta is zero.

    Args:
        density: Fraction of entries that each task keeps, in (0, 1]; at least one is kept.
        rank: Largest number k of directions of each task; never more than :math:`\lfloor \min(m, n) / N \rfloor`, so
            that all of them can be orthogonal.
        smoothing: What becomes of a task's singular values: ``none`` leaves them, ``average`` gives all of them their
            mean, ``linear`` lets them fall in a straight line, with the same sum.
        rho: For ``linear``, how many times the last value the first one may be at most; less if it was less before.
        scale: Factor α on the merged delta.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        Each of the two tasks keeps its strongest direction: the first its 3, the second its 2.

        >>> DCMerge().merge([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0]))])
        tensor([[3., 0.],
                [0., 2.]])
    """

    linear = True

    def __init__(
        self,
        density: float = 1e-3,
        rank: int | None = None,
        smoothing: Smoothing = "none",
        rho: float = 5.0,
        scale: float = 1.0,
    ) -> None:
        refuse(
            "DCMerge",
            [
                fraction("density", density, zero=False, one=True),
                None if rank is None or rank >= 1 else f"rank must be 1 or more, got {rank!r}",
                choice("smoothing", smoothing, get_args(Smoothing)),
                None if rho >= 1 else f"rho must be 1 or more, got {rho!r}",
                finite("scale", scale),
            ],
        )
        self.density = density
        self.rank = rank
        self.smoothing = smoothing
        self.rho = rho
        self.scale = scale

    def _num_svds(self, num_tasks: int) -> int:
        return num_tasks + 2  # each task's, and those of the two bases that are made orthogonal

    def _merge_rotated(self, deltas: Sequence[Tensor], coefficients: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        room = min(shape) // len(deltas)
        parts = [thin_svd(delta, room if self.rank is None else min(self.rank, room)) for delta in deltas]
        ranks = [len(S) for _, S, _ in parts]
        is_full = self.rank is None and max(ranks) == room
        side = min(shape) if is_full else len(deltas) * max(ranks)
        num_kept = max(1, int(self.density * side**2))
        left, _, right = join(parts)
        P, Q = orthogonalize(left), orthogonalize(right)
        cores = torch.stack([_largest((P.T @ U * self._smoothed(S)) @ (Vh @ Q.T), num_kept) for U, S, Vh in parts])
        merged = elect_and_average(cores, coefficients)
        owner = torch.repeat_interleave(torch.tensor(ranks, device=merged.device))
        return self.scale * P @ merged.where(owner[:, None] == owner, 0.0) @ Q

    def _smoothed(self, S: Tensor) -> Tensor:
        if self.smoothing == "none" or not len(S):
            return S
        if self.smoothing == "average":
            return S.mean().expand_as(S)
        line = torch.linspace(min(self.rho, float(S[0] / S[-1])), 1.0, len(S), dtype=S.dtype, device=S.device)
        return S.sum() * line / line.sum()


def _largest(matrix: Tensor, count: int) -> Tensor:
    """The matrix with all but its largest entries, by magnitude, set to zero."""
    if count >= matrix.numel():
        return matrix
    kept = torch.zeros_like(matrix)
    places = matrix.abs().flatten().topk(count).indices
    kept.view(-1)[places] = matrix.flatten()[places]
    return kept
