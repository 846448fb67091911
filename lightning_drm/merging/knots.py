r"""KnOTS (arXiv 2410.19735): TIES in the space that the SVD of all tasks' deltas side by side gives.

The paper finds LoRA finetunes of one base less aligned than full ones, and aligns them in a basis that all tasks share.
For deltas :math:`D_1, …, D_N` of shape (m, n):

1. **Decompose** the stack of all deltas, and drop the directions that hold nothing:

   .. math:: [D_1 \cdots D_N] = U \Sigma\, [V_1^T \cdots V_N^T]

2. **Trim** each task: of the L entries that it has in the whole model, those strictly below the k-th smallest magnitude
   become zero, :math:`k = L - \mathrm{round}(L \cdot \mathrm{density})`. The entries are those of
   :math:`\Sigma V_t^T = U^T D_t`, or of :math:`V_t^T` where `scaled` is false.
3. **Elect** signs and **average disjointly**, as TIES does: `elect_and_average`.
4. Go back, from :math:`P` to :math:`D = U P`, or to :math:`U \Sigma P`.

In this code, `JointBasis` takes step 1 and `WeighedRows` the rest. Both know the rows of :math:`V_t^T` by their
directions and lengths: multiplying a row by :math:`\sigma_i` before or after the vote makes no difference to it.

What differs from the published code:

* It drops singular values up to 1e-5, whatever the size of the deltas; here it is up to 1e-5 of the largest one.
* It keeps :math:`\lfloor L \cdot \mathrm{density} \rfloor + 1` entries, and here the k-th smallest stays, too, as in
  TIES: :math:`\mathrm{round}(L \cdot \mathrm{density}) + 1`, one more where the fraction is above a half.
* Magnitudes that equal the threshold up to 1e-10 of it count as equal, and stay (see `selection.TIE`).
* It has one λ for all tasks, 0.6; that is `scale`, 1 here as in TIES. The coefficients
  weigh the average, not the vote.
* Low-rank deltas stay factors, and so does the result, whose rank is at most the sum of theirs.
* Its variant that first drops entries at random, as DARE does, is not offered.

With `scaled` false and one threshold for each parameter, this is DRM without renormalization and with individual
pruning, which Core Space (arXiv 2509.17786) takes for KnOTS.

Cost: that of a joint basis (see `joint_basis.py`), once for the merge and once for each pass over the model that looks
for thresholds: two passes for dense deltas in float32, four in float64, in which factors are decomposed. A search that
keeps decompositions (`prepare`) takes each basis once for everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.merging.inputs import check_coefficients, check_thresholds, finite, fraction, refuse
from lightning_drm.merging.joint_basis import JointBasis, joint_basis_cost, joint_basis_side
from lightning_drm.merging.linalg.selection import Reduce, identity, thresholds
from lightning_drm.merging.low_rank import Delta, LowRank
from lightning_drm.merging.precision import ieee_arithmetic
from lightning_drm.merging.prepared import PreparedMethod
from lightning_drm.merging.scaling import times_power_
from lightning_drm.merging.weighed_rows import WeighedRows, joint_rows, scaled_rows

RANK_TOL = 1e-5
"""Fraction of the largest singular value up to which directions are dropped."""


class KnOTS(PreparedMethod):
    r"""KnOTS-TIES: trim each task in the joint basis of all deltas, elect signs there, average what agrees.

    .. math:: D = \mathrm{scale} \cdot U\, \mathrm{elect\_and\_average}_t(\mathrm{trim}(U^T D_t)), \qquad
        [D_1 \cdots D_N] = U \Sigma V^T

    Args:
        density: Fraction of each task's entries to keep, in (0, 1]; the paper's top-k %.
        scaled: Whether the entries are those of :math:`\Sigma V_t^T`, or of :math:`V_t^T` alone, where the weak
            directions count as much as the strong ones.
        scale: Factor on the merged delta; the paper's λ.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        The tasks share no direction: :math:`U = I` and :math:`\Sigma = \mathrm{diag}(10, 1)`. One of each task's 4
        entries stays.

        >>> deltas = [torch.tensor([[6.0, 8.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
        >>> KnOTS(density=0.1).merge(deltas).round().int().tolist()
        [[0, 8], [1, 0]]
    """

    linear = True

    def __init__(self, density: float = 0.2, scaled: bool = True, scale: float = 1.0) -> None:
        refuse("KnOTS", [fraction("density", density, zero=False, one=True), finite("scale", scale)])
        self.density = density
        self.scaled = scaled
        self.scale = scale
        self.thresholds: tuple[float, ...] | None = None

    @property
    @override
    def preparation(self) -> tuple[object, ...]:
        return ()

    @override
    def prepare(self, deltas: Sequence[Delta]) -> JointBasis:
        """Decompose once what then serves any density, coefficients, and scaled or not.

        Args:
            deltas: As for `merge`.

        Returns:
            The deltas in their joint basis.

        Raises:
            ValueError: As `merge`.
        """
        checked, _ = self._check(deltas, None)
        with ieee_arithmetic(checked[0].device):
            return _basis(checked)

    @override
    def merge_prepared(self, prepared: JointBasis, coefficients: Sequence[float] | None = None) -> LowRank:
        """Merge deltas that have been decomposed before, possibly for another setting.

        Args:
            prepared: What `prepare` returned.
            coefficients: As for `merge`.

        Returns:
            The merged delta as factors U (m, r) and P (r, n), for r joint directions.

        Raises:
            ValueError: If the coefficients are not N finite numbers.
        """
        checked = check_coefficients("KnOTS", coefficients, len(prepared.sigma))
        with ieee_arithmetic(prepared.U.device):
            return self._fuse(prepared, checked, torch.empty_like(prepared.rows[0]))

    @override
    def calibrate_prepared(
        self, stream: Callable[[], Iterable[Any]], *, reduce: Reduce = identity, num_tasks: int | None = None
    ) -> Self:
        """Find each task's threshold over its entries in the joint bases of all parameters.

        The arguments are those of `PreparedMethod.calibrate_prepared`. The stream is called once for each pass.

        Returns:
            A copy with the thresholds fixed.
        """

        def seen() -> Iterator[Iterator[Tensor]]:
            for basis in stream():
                yield self._seen(basis)

        with torch.no_grad():
            first = next(iter(stream()), None) if num_tasks is None else None
            count = num_tasks or (0 if first is None else len(first.rows))
            return self._with(thresholds=thresholds(seen, self.density, num_tasks=count, reduce=reduce))

    @override
    def cost(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> float:
        return joint_basis_cost(shape, num_tasks, rank)

    @override
    def square_side(self, shape: tuple[int, ...], num_tasks: int, rank: int | None = None) -> int:
        return joint_basis_side(shape, num_tasks, rank)

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        basis = _basis(deltas)
        factors = self._fuse(basis, coefficients, basis.rows[0])
        del basis  # the other rows
        return factors.dense()

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        basis = _basis(deltas)
        return self._fuse(basis, coefficients, basis.rows[0])

    def _fuse(self, basis: JointBasis, coefficients: Sequence[float], out: Tensor) -> LowRank:
        """Steps 2 to 4; `out` takes the outcome P, as for `WeighedRows.merged`."""
        rows, num_tasks = self._rows(basis), len(basis.rows)
        if self.thresholds is None:
            limits = thresholds(lambda: [rows.seen()], self.density, num_tasks=num_tasks)
        else:
            limits = self._limits_here(check_thresholds("KnOTS", self.thresholds, num_tasks), basis)
        return rows.merged(limits, coefficients, scale=self.scale, out=out)

    def _limits_here(self, limits: Sequence[float], basis: JointBasis) -> tuple[float, ...]:
        """The whole model's thresholds at the size of a basis, which may be so small that all are beyond it."""
        here = times_power_(torch.tensor(limits, dtype=torch.float64), -self._exponent(basis))
        return tuple(here.clamp_(max=torch.finfo(basis.rows[0].dtype).max).tolist())

    def _rows(self, basis: JointBasis) -> WeighedRows:
        return scaled_rows(basis) if self.scaled else joint_rows(basis)

    def _seen(self, basis: JointBasis) -> Iterator[Tensor]:
        """Each task's entries at the size that they have in the whole model, which float32 may not hold."""
        for rows in self._rows(basis).seen():
            yield times_power_(rows.double(), exponent) if (exponent := self._exponent(basis)) else rows

    def _exponent(self, basis: JointBasis) -> int:
        """The power of two that is missing in the entries; the rows of V_tᵀ have no size that could be missing."""
        return basis.exponent if self.scaled else 0


def _basis(deltas: Sequence[Delta]) -> JointBasis:
    return JointBasis.of(deltas, "horizontal", RANK_TOL, 0.0)
