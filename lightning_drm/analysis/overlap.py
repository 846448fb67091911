r"""How task vectors lie to each other and to a merge: inner products, and the subspace alignment ratio.

The ratio is that of arXiv 2502.04959, equations 5 and 6: how much of a task's delta lies in the leading directions of
the merged one.

1. For a merged matrix M with left singular vectors U, take the smallest k of which the first k directions leave at most
   an error of ε = 5 %: :math:`\lVert M - U_k U_k^T M \rVert_F \le \varepsilon \lVert M \rVert_F`.
2. Project:

   .. math:: \mathrm{SAR}(D_t, M) = \frac{\lVert U_k U_k^T D_t \rVert_F}{\lVert D_t \rVert_F} \in [0, 1]

The paper's published code takes another k, the last one before :math:`\lVert U_k U_k^T M \rVert_F` exceeds 95 % of
:math:`\lVert M \rVert_F`, which leaves an error of 31 % or more; here it is the text's. Random directions would give
about :math:`\sqrt{k / m}` for a delta of m rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.linalg.spectral import thin_svd
from lightning_drm.merging.low_rank import densify

ERROR = 0.05
"""The paper's ε."""

_CHUNK = 1 << 22  # entries of a task that are float64 at once


def inner_products(deltas: Sequence[Delta]) -> Tensor:
    r"""The inner products of all pairs of N deltas, in float64.

    .. math:: G_{st} = \langle D_s, D_t \rangle = \sum_{ij} (D_s)_{ij} (D_t)_{ij}

    Low-rank deltas stay factors: :math:`\langle B_s A_s, B_t A_t \rangle = \langle B_s^T B_t, A_s A_t^T \rangle`.

    Args:
        deltas: N deltas of one shape, of any number of dimensions.

    Returns:
        A matrix (N, N).

    Example:
        >>> up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
        >>> inner_products([LowRank(up, down), LowRank(2 * up, down)])
        tensor([[125., 250.],
                [250., 500.]], dtype=torch.float64)
    """
    factors = [delta.to(torch.float64) for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        return torch.stack(
            [torch.stack([((a.up.mT @ b.up) * (a.down @ b.down.mT)).sum() for b in factors]) for a in factors]
        )
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for chunk in _chunks([densify(delta) for delta in deltas]):
        total += chunk @ chunk.T
    return total


def cosines(products: Tensor) -> Tensor:
    """The cosines of all pairs, from their inner products; NaN for a task vector of zeros.

    Args:
        products: What `inner_products` gave, or a sum of these over parameters.

    Example:
        >>> cosines(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    lengths = products.diagonal().sqrt()
    return products / (lengths[:, None] * lengths)


def leading_directions(merged: Tensor, error: float = ERROR) -> Tensor:
    r"""The fewest left singular vectors :math:`U_k` that leave a relative error of at most `error`.

    Args:
        merged: A matrix M of shape (m, n).
        error: The largest :math:`\lVert M - U_k U_k^T M \rVert_F / \lVert M \rVert_F`.

    Returns:
        Orthonormal columns (m, k); none for a matrix of zeros.

    Example:
        >>> leading_directions(torch.diag(torch.tensor([0.03, 2.0, 1.0]))).abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
    """
    U, S, _ = thin_svd(merged)
    energy = S.double().square()
    left_over = energy.flip(0).cumsum(0).flip(0)  # without the first 0, 1, … directions
    return U[:, : int((left_over > error**2 * energy.sum()).sum())]


def alignment_ratio(directions: Tensor, delta: Delta) -> float:
    """How much of a delta lies in some directions; the header has the formula.

    Args:
        directions: Orthonormal columns (m, k).
        delta: A delta of shape (m, n).

    Returns:
        The ratio, from 0 to 1; NaN for a delta of zeros.

    Example:
        >>> alignment_ratio(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [4.0]]))
        0.6
    """
    directions = directions.double()
    if isinstance(delta, LowRank):
        up, down = delta.up.double(), delta.down.double()
        inside: Delta = LowRank(directions.T @ up, down)
    else:
        inside = directions.T @ delta.double()
    squared = [inner_products([part])[0, 0] for part in (inside, delta)]
    return float((squared[0] / squared[1]).sqrt().clamp(max=1))  # above 1 by rounding


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """A few entries of all tensors at a time, (N, c) in float64."""
    for parts in zip(*(torch.split(tensor.flatten(), _CHUNK) for tensor in tensors), strict=True):
        yield torch.stack([part.double() for part in parts])
