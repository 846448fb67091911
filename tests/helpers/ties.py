"""Entries of a merge that rounding decides: they are left out of comparisons, and everything else is held tightly.

Pruning and voting are jumps. Where a magnitude equals the threshold to rounding, or a vote is a draw to rounding, one
processor keeps the entry and another drops it, and both are right. Which entries these are follows from the float64
reference and from how large the rounding errors of the compared precision can be; nothing here looks at the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers import reference
from lightning_drm.merging import DARETIES, DRM, TIES, KnOTS, Method

DOUBLE = torch.finfo(torch.float64).eps
FEW = 0.1  # fraction of a matrix that a comparison may leave out
EQUAL = 1e-10  # DRM and the reference keep what is smaller than the threshold by no more than this fraction


def settled(
    merged: Tensor, expected: Tensor, method: Method, deltas: Sequence[Tensor], *, noise: float = 0.0
) -> Tensor:
    """The expected result, with the few entries that rounding decides taken from the merged one.

    Args:
        merged: What is compared, in the precision in which it was computed.
        expected: The float64 reference for the same deltas.
        method: How both were merged. Of the parameters, only those that decide about ties are looked at.
        deltas: N dense deltas, as the reference got them.
        noise: Error of the deltas that were merged, as a fraction of the largest singular value (DRM, KnOTS) or of a
            task's largest entry (TIES), where they were not quite these.
    """
    assert merged.isfinite().all()
    open_ = undecided(method, deltas, merged.dtype, noise)
    left_out = float(open_.double().mean()) if open_.numel() else 0.0
    assert left_out <= FEW, (
        f"{method!r}: rounding decides {left_out:.1%} of the entries, so the comparison shows little"
    )
    return torch.where(open_, merged.to(expected.dtype), expected)


def undecided(method: Method, deltas: Sequence[Tensor], dtype: torch.dtype, noise: float = 0.0) -> Tensor:
    """Which entries of a merge in this precision rounding decides, of the deltas' shape."""
    deltas = [delta.detach().double() for delta in deltas]
    eps = float(torch.finfo(dtype).eps)
    if isinstance(method, KnOTS):
        alike = DRM(density=method.density, rank_tol=1e-5, renormalize=False, prune="individual")
        return _drm(alike, deltas, eps, noise, scaled=method.scaled).expand(deltas[0].shape)
    if isinstance(method, DRM):
        sides = [delta.T for delta in deltas] if method.direction == "vertical" else deltas
        lines = _drm(method, sides, eps, noise)  # each is a whole column of U P
        shape = deltas[0].shape
        return (lines[:, None] if method.direction == "vertical" else lines).expand(shape)
    stack = torch.stack(deltas)
    if isinstance(method, TIES):
        errors = noise * torch.stack([task.abs().amax().expand_as(task) for task in stack])
        pruned = [_at_the_cut(task, error, method.density) for task, error in zip(stack, errors, strict=True)]
        kept = torch.stack([reference.trim(task, method.density) for task in stack])
        return torch.stack(pruned).any(0) | _draws(kept, errors, eps)
    if isinstance(method, DARETIES):
        assert method.density == 1, "what is drawn at random is not compared with a reference"
        return _draws(stack, torch.zeros_like(stack), eps)
    return torch.zeros(deltas[0].shape, dtype=torch.bool)


def _drm(method: DRM, deltas: list[Tensor], eps: float, noise: float, *, scaled: bool = False) -> Tensor:
    """Which columns (n,) of a horizontal merge hang on an entry that rounding decides; `scaled`: as KnOTS prunes."""
    (_, width), num_tasks = deltas[0].shape, len(deltas)
    _, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = reference.num_kept(S, method.rank_tol, method.rank_drop)
    if kept == 0:
        return torch.zeros(width, dtype=torch.bool)
    off = (noise + DOUBLE * S[0] / S[kept - 1]) * S[0]  # how far singular values can be
    between = S[:kept].min() - S[kept:].max() if kept < len(S) else torch.inf
    at_the_cut = between <= 2 * off or (S - method.rank_tol * S[0]).abs().min() <= off
    if at_the_cut and (method.rank_tol > 0 or method.density < 1):  # else it is a direction of length zero that is open
        return torch.ones(width, dtype=torch.bool)

    rows = torch.stack((S[:, None] * Vh).split(width, dim=1))  # P of all tasks and directions
    error = _errors(S, rows, torch.stack([delta.norm(dim=0) for delta in deltas]), kept, eps, noise)
    rows = rows[:, :kept]
    lengths = rows.norm(dim=2, keepdim=True) if method.renormalize else S[:kept, None].expand(num_tasks, kept, 1)
    if scaled:
        lengths = torch.ones_like(lengths)
    present = (rows.norm(dim=2, keepdim=True) > 1e-13 * S[:kept, None]).expand_as(rows)
    seen, uncertain = (torch.where(present, part / lengths, 0) for part in (rows, error))

    scopes = [...] if method.prune == "joint" else list(range(num_tasks))
    pruned, tied = torch.empty_like(seen), torch.empty_like(seen, dtype=torch.bool)
    for scope in scopes:
        pruned[scope] = reference.trim(seen[scope], method.density, EQUAL)
        tied[scope] = _at_the_cut(seen[scope], uncertain[scope], method.density, EQUAL)
    open_ = tied.any(0)
    if method.elect_sign:
        open_ |= _draws(torch.where(pruned != 0, rows, 0), error, eps)
    return (open_ & (rows.abs().amax(0) > eps * S[0])).any(0)  # what is smaller makes no difference


def _errors(S: Tensor, rows: Tensor, sizes: Tensor, kept: int, eps: float, noise: float) -> Tensor:
    """How far the entries of the kept rows can be off, (N, kept, n), to first order.

    Rounding in the Gram matrix and errors of the deltas turn each direction towards the others, the more the closer
    their singular values are. The projection Uᵀ D_t is then rounded on the scale of the columns of D_t (N, n).
    """
    squares = (S[:kept, None].square() - S.square()).abs().fill_diagonal_(torch.inf)
    gaps = (S[:kept, None] - S).abs().fill_diagonal_(torch.inf)
    turned = 4 * DOUBLE * S[0].square() / squares + noise * S[0] / gaps
    return turned @ rows.abs() + ((eps + noise) * sizes[:, None] + 4 * DOUBLE * S[0])


def _at_the_cut(values: Tensor, errors: Tensor, density: float, equal: float = 0.0) -> Tensor:
    """Which values may be on either side of the pruning threshold, when each is off by at most its error.

    The k-th smallest magnitude is then at least the k-th smallest of the least that they can be, and at most that of
    the most. Where all but the k − 1 smallest are sure to stay, nothing is open. With everything kept, it is values
    around zero that count as an entry of a task, or do not.
    """
    least, most = values.abs() - errors, values.abs() + errors
    k = values.numel() - round(values.numel() * density)
    low, high = (float(part.flatten().kthvalue(k).values) * (1 - equal) if k else 0.0 for part in (least, most))
    if int((most < low).sum()) == k - 1:
        return torch.zeros_like(values, dtype=torch.bool)
    return (least <= high) & (most >= low) & (errors > 0)


def _draws(stack: Tensor, errors: Tensor, eps: float) -> Tensor:
    """Where tasks of both signs add up to zero, to rounding."""
    slack = torch.where(stack != 0, errors, 0).sum(0) + len(stack) * eps * stack.abs().sum(0)
    return (stack > 0).any(0) & (stack < 0).any(0) & (stack.sum(0).abs() <= slack)
