"""Plain float64 versions of every method, written as the papers write them, for the tests to compare with.

Nothing here is shared with the package: full SVDs, sorts and loops over tasks, no reuse, no low rank, no regard for
speed. Inputs are sequences of (m, n) tensors; everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _float64(deltas: Sequence[Tensor]) -> list[Tensor]:
    return [delta.double() for delta in deltas]


def _coefficients(deltas: Sequence[Tensor], coefficients: Sequence[float] | None) -> list[float]:
    return [1.0] * len(deltas) if coefficients is None else list(coefficients)


def trim(values: Tensor, density: float, tie: float = 0.0) -> Tensor:
    """Zero what is strictly below the k-th smallest magnitude, k = L - round(L * density), but for near ties."""
    k = values.numel() - round(values.numel() * density)
    if k <= 0:
        return values.clone()
    threshold = values.abs().flatten().sort().values[k - 1]
    return torch.where(values.abs() < threshold * (1 - tie), torch.zeros_like(values), values)


def elect_and_average(
    stack: Tensor, coefficients: Sequence[float], elect_sign: bool = True, disjoint: bool = True
) -> Tensor:
    """Keep the entries of the sign with the larger mass, weigh them, divide by how many are left. `stack`: (N, …)."""
    if elect_sign:
        majority = torch.sign(stack.sum(0))
        stack = torch.where(torch.sign(stack) == majority, stack, torch.zeros_like(stack))
    weighted = torch.stack([coefficient * part for coefficient, part in zip(coefficients, stack, strict=True)])
    count = (stack != 0).sum(0).clamp(min=1) if disjoint else torch.tensor(len(stack))
    return weighted.sum(0) / count


def num_kept(S: Tensor, rank_tol: float, rank_drop: float) -> int:
    """How many joint directions take part: those above `rank_tol` of the largest, less the dropped fraction of them."""
    above = int((rank_tol * S[0] < S).sum()) if len(S) and S[0] > 0 else 0
    return max(min(above, 1), round((1 - rank_drop) * above))


def drm(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    direction: str = "horizontal",
    density: float = 0.2,
    rank_tol: float = 1e-2,
    rank_drop: float = 0.0,
    renormalize: bool = True,
    prune: str = "joint",
    elect_sign: bool = True,
    disjoint: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Decom-Renorm-Merge with the SVD of the whole stack (arXiv 2505.23117, Algorithm 1)."""
    deltas = _float64(deltas)
    coefficients = _coefficients(deltas, coefficients)
    if direction == "vertical":
        transposed = [delta.T for delta in deltas]
        return drm(
            transposed,
            coefficients,
            "horizontal",
            density,
            rank_tol,
            rank_drop,
            renormalize,
            prune,
            elect_sign,
            disjoint,
            scale,
        ).T
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    keep = num_kept(S, rank_tol, rank_drop)
    if keep == 0:
        return torch.zeros_like(deltas[0])
    U, S, Vh = U[:, :keep], S[:keep], Vh[:keep]
    blocks = torch.stack(Vh.split(deltas[0].shape[1], dim=1))  # (N, r, n)
    sigma = S.expand(len(deltas), -1).clone()
    if renormalize:
        norms = blocks.norm(dim=2)
        # A block below the SVD's own rounding is a task without any part in this direction.
        blocks = torch.where((norms > 1e-13)[..., None], blocks / norms[..., None], torch.zeros_like(blocks))
        sigma = sigma * norms
    # Equal entries that the SVD rounds differently are ties: a task of rank 1 has the same unit row everywhere.
    pruned = trim(blocks, density, 1e-10)
    if prune == "individual":
        pruned = torch.stack([trim(block, density, 1e-10) for block in blocks])
    scaled = sigma[..., None] * pruned
    return scale * U @ elect_and_average(scaled, coefficients, elect_sign, disjoint)


def ties(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, density: float = 0.2, scale: float = 1.0
) -> Tensor:
    """TIES with one threshold per tensor (arXiv 2306.01708, Algorithm 1)."""
    deltas = _float64(deltas)
    trimmed = torch.stack([trim(delta, density) for delta in deltas])
    return scale * elect_and_average(trimmed, _coefficients(deltas, coefficients))


def task_arithmetic(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 0.4
) -> Tensor:
    """Weighted sum (arXiv 2212.04089)."""
    deltas = _float64(deltas)
    return scale * sum(
        coefficient * delta for coefficient, delta in zip(_coefficients(deltas, coefficients), deltas, strict=True)
    )


def average(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None) -> Tensor:
    """Weighted sum over the number of tasks."""
    return task_arithmetic(deltas, coefficients, scale=1.0 / len(deltas))


def _svd(matrix: Tensor, rank: int | None = None, size: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The numerical rank's triplets, at most `rank`; `size` is the norm of what the matrix is a remainder of."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    noise = max(matrix.shape) * torch.finfo(S.dtype).eps * max(size, float(S[:1].sum()))
    kept = min(int((noise < S).sum()), len(S) if rank is None else rank)
    return U[:, :kept], S[:kept], Vh[:kept]


def _polar(matrix: Tensor) -> Tensor:
    U, _, Vh = _svd(matrix)
    return U @ Vh


def iso_c(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """Isotropic merging in the common subspace (arXiv 2502.04959, Algorithm 1)."""
    total = task_arithmetic(deltas, coefficients, scale=1.0)
    U, S, Vh = _svd(total)
    return scale * S.mean() * U @ Vh if len(S) else torch.zeros_like(total)


def iso_cts(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    common_fraction: float = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Isotropic merging in common and task-specific subspaces (arXiv 2502.04959, Algorithm 2)."""
    deltas = [c * delta for c, delta in zip(_coefficients(deltas, coefficients), _float64(deltas), strict=True)]
    full = min(deltas[0].shape)
    rest = min(round((full - int(full * common_fraction)) / len(deltas)), full // len(deltas)) * len(deltas)
    common = full - rest
    U, S, Vh = _svd(sum(deltas), common)
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vh = _svd(delta - U @ (U.T @ delta), rest // len(deltas), float(delta.norm()))
        lefts.append(u)
        values.append(s)
        rights.append(vh)
    left = torch.cat([*lefts, U], dim=1)
    right = torch.cat([*rights, Vh], dim=0)
    mean = torch.cat([*values, S]).sum() / max(1, left.shape[1])
    return scale * mean * _polar(left) @ _polar(right)


def tsv_m(deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """Task singular vectors (arXiv 2412.00081, Algorithm 1)."""
    deltas = _float64(deltas)
    rank = min(deltas[0].shape) // len(deltas)
    parts = [_svd(delta, rank) for delta in deltas]
    weights = _coefficients(deltas, coefficients)
    left = torch.cat([u for u, _, _ in parts], dim=1)
    right = torch.cat([vh for _, _, vh in parts], dim=0)
    values = torch.cat([c * s for c, (_, s, _) in zip(weights, parts, strict=True)])
    return scale * _polar(left) @ (values[:, None] * _polar(right))


def wudi(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, ridge: float = 0.1, scale: float = 1.0
) -> Tensor:
    """WUDI in closed form (arXiv 2503.08099, the loss of its equation 4), with this package's ridge."""
    pairs = zip(_coefficients(deltas, coefficients), _float64(deltas), strict=True)
    tasks = [(c, delta) for c, delta in pairs if delta.any()]
    if not tasks:
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    units = [delta / delta.norm() for _, delta in tasks]
    grams = [unit.T @ unit for unit in units]
    if ridge:
        anchor = sum(c * delta for c, delta in tasks)
        change = sum((c * delta - anchor) @ gram for (c, delta), gram in zip(tasks, grams, strict=True))
        size = ridge * torch.diagonal(sum(grams)).mean()
        return scale * (anchor + change @ torch.linalg.inv(sum(grams) + size * torch.eye(len(grams[0])).double()))
    X = torch.cat([unit.T for unit in units], dim=1)
    Y = torch.cat([c * delta @ unit.T for (c, delta), unit in zip(tasks, units, strict=True)], dim=1)
    return scale * Y @ torch.linalg.pinv(X, rtol=1e-10)


def svc(
    deltas: Sequence[Tensor], merged: Tensor, coefficients: Sequence[float] | None = None, alpha: float | None = None
) -> Tensor:
    """SVC (arXiv 2602.05536) of a merged delta, direction by direction."""
    tasks = [c * delta for c, delta in zip(_coefficients(deltas, coefficients), _float64(deltas), strict=True)]
    total = torch.zeros_like(merged)
    U, S, Vh = _svd(merged)
    for u, sigma, v in zip(U.T, S, Vh, strict=True):
        overshoots = []
        for task in tasks:
            part = task.T @ u
            has_part = float(part.norm()) > 1e-11 * float(task.norm())
            overshoots.append(float(sigma * v @ part / (part @ part)) if has_part else 0.0)
        lowest = 1 / len(tasks) if alpha is None else alpha
        total += sigma / (sum(max(lowest, overshoot) for overshoot in overshoots) / len(tasks)) * torch.outer(u, v)
    return total


def star(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, eta: float = 40.0, scale: float = 1.0
) -> Tensor:
    """STAR (arXiv 2502.10339): truncated and rescaled spectra, averaged."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for coefficient, delta in zip(_coefficients(deltas, coefficients), _float64(deltas), strict=True):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        rank = 0
        while S[:rank].sum() < eta / 100 * S.sum():
            rank += 1
        if rank:
            total += coefficient * (S.sum() / S[:rank].sum()) * (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return scale * total / len(deltas)


def dc_merge(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    density: float = 1e-3,
    rank: int | None = None,
    smoothing: str = "none",
    rho: float = 5.0,
    scale: float = 1.0,
) -> Tensor:
    """DC-Merge (arXiv 2603.06242), as its published code computes it."""
    deltas, short = _float64(deltas), min(deltas[0].shape)
    room = short // len(deltas)
    parts = [_svd(delta, room if rank is None else min(rank, room)) for delta in deltas]
    ranks = [len(s) for _, s, _ in parts]
    side = short if rank is None and max(ranks) == room else len(deltas) * max(ranks)
    P = _polar(torch.cat([u for u, _, _ in parts], dim=1))
    Q = _polar(torch.cat([vh for _, _, vh in parts], dim=0))
    cores, block = [], torch.zeros(sum(ranks), sum(ranks), dtype=torch.float64)
    for task, (u, s, vh) in enumerate(parts):
        if smoothing == "average":
            s = torch.full_like(s, s.mean())
        elif smoothing == "linear" and len(s):
            line = torch.linspace(min(rho, float(s[0] / s[-1])), 1.0, len(s), dtype=torch.float64)
            s = s.sum() * line / line.sum()
        core = P.T @ (u * s @ vh) @ Q.T
        smallest = core.abs().flatten().sort(descending=True).values[: max(1, int(density * side**2))][-1:]
        cores.append(torch.where(core.abs() < smallest, torch.zeros_like(core), core) if core.numel() else core)
        first = sum(ranks[:task])
        block[first : first + ranks[task], first : first + ranks[task]] = 1.0
    merged = elect_and_average(torch.stack(cores), _coefficients(deltas, coefficients))
    return scale * P @ (block * merged) @ Q


def knots_entries(deltas: Sequence[Tensor], scaled: bool = True) -> tuple[Tensor, Tensor]:
    """What KnOTS trims of each task, (N, r, n), and the basis (m, r) that it goes back with."""
    U, S, Vh = torch.linalg.svd(torch.cat(_float64(deltas), dim=1), full_matrices=False)
    keep = num_kept(S, 1e-5, 0.0)
    U, S = U[:, :keep], S[:keep]
    blocks = torch.stack(Vh[:keep].split(deltas[0].shape[1], dim=1))
    # A block below the SVD's own rounding is a task without any part in this direction.
    blocks = torch.where(blocks.norm(dim=2, keepdim=True) > 1e-13, blocks, torch.zeros_like(blocks))
    return (S[:, None] * blocks, U) if scaled else (blocks, U * S)


def knots(
    deltas: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    density: float = 0.2,
    scaled: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """KnOTS-TIES with the SVD of the whole stack (arXiv 2410.19735), one threshold per task."""
    entries, back = knots_entries(deltas, scaled)
    trimmed = torch.stack([trim(task, density, 1e-10) for task in entries])
    return scale * back @ elect_and_average(trimmed, _coefficients(deltas, coefficients))


def cores(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, R), the cores (N, R, R') and V^T (R', n) of core space (arXiv 2509.17786), of deltas' balanced factors."""
    deltas = _float64(deltas)
    parts = [_svd(delta) for delta in deltas]
    U, _, _ = _svd(torch.cat([u * s.sqrt() for u, s, _ in parts], dim=1))
    _, _, Vh = _svd(torch.cat([s.sqrt()[:, None] * vh for _, s, vh in parts], dim=0))
    return U, torch.stack([U.T @ delta @ Vh.T for delta in deltas]), Vh


def core_ties(
    deltas: Sequence[Tensor], coefficients: Sequence[float] | None = None, density: float = 0.2, scale: float = 1.0
) -> Tensor:
    """TIES in core space, one threshold per task."""
    U, entries, Vh = cores(deltas)
    trimmed = torch.stack([trim(core, density, 1e-10) for core in entries])
    return scale * U @ elect_and_average(trimmed, _coefficients(deltas, coefficients)) @ Vh


def ties_between_bases(
    spaces: Sequence[tuple[Tensor, Tensor, Tensor]], coefficients: Sequence[float], density: float
) -> list[Tensor]:
    """TIES on the entries (N, …) of several matrices, each between a left and a right basis: one threshold per task."""
    sizes = [entries[0].numel() for _, entries, _ in spaces]
    tasks = range(len(coefficients))
    whole = [torch.cat([entries[task].flatten() for _, entries, _ in spaces]) for task in tasks]
    trimmed = [trim(values, density, 1e-10).split(sizes) for values in whole]
    merged = []
    for place, (left, entries, right) in enumerate(spaces):
        stack = torch.stack([task[place].view(entries[0].shape) for task in trimmed])
        merged.append(left @ elect_and_average(stack, list(coefficients)) @ right)
    return merged


def knots_space(deltas: Sequence[Tensor], scaled: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """What KnOTS trims, between the basis that it goes back with and none."""
    entries, back = knots_entries(deltas, scaled)
    return back, entries, torch.eye(deltas[0].shape[1], dtype=torch.float64)
