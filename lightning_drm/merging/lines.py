r"""LiNeS (arXiv 2410.17146): after any merge, deep blocks keep more of the merged delta than shallow ones.

Shallow blocks hold what all tasks need, deep ones what a task needs for itself. Let the blocks of a model be
:math:`l = 0, …, L - 1`, the tasks' deltas :math:`D_t` and coefficients :math:`\lambda_t`, and D what another method
merges of them, over the whole model:

1. Of several tasks: :math:`\alpha = \frac{1}{N} \|\sum_t \lambda_t D_t\|_1 / \|D\|_1`, which brings the shallowest
   block to the size of the tasks' mean. Of one task, the paper chooses α.
2. Each parameter of block l is multiplied by :math:`\alpha + \beta\, l / (L - 1)`, and each one outside all blocks by
   α. Heads are not touched.

β is tuned on (0, 1] for several tasks; for one it is 1 − α, so that the last block keeps its delta. These factors take
the place of λ, so D is best merged with a scale of 1.

What differs from the paper: it has no coefficients; here they weigh the deltas, in D and in step 1. Parameters that
keep the base's value are in neither norm. Its code tells a block by the first ".l." in a parameter's name;
`lightning_drm.fusion.blocks` says what is a block here. This file knows no names: it is given a block's depth
:math:`l / (L - 1)`. Cost: a product for each entry; and with α to be found, a merge of the whole model before the one
whose result is used.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from torch import Tensor

from lightning_drm.merging.inputs import at_least_zero, refuse
from lightning_drm.merging.low_rank import LowRank
from lightning_drm.merging.method import Method

AnyDelta = TypeVar("AnyDelta", Tensor, LowRank)

BETA = 0.5
"""β of several tasks, unless it is given: the middle of the paper's grid."""


class LiNeS(Method):
    r"""Layer-increasing scaling of what another method has merged.

    .. math:: D_l \mapsto \Big(\alpha + \beta \frac{l}{L - 1}\Big) D_l, \qquad
        \alpha = \frac{\|\sum_t \lambda_t D_t\|_1}{N\, \|D\|_1}

    The factors belong to a model, not to a matrix. So a recipe merges with it (`merge_checkpoints`, a session, or the
    command line), and `merge` refuses to.

    Args:
        method: The method that merges, with a scale of 1, as the factors take its place. Not another LiNeS.
        alpha: Factor α of the first block and of what is in no block, at least 0; ``"auto"`` takes it from the norms.
        beta: How much higher the factor of the last block is, at least 0. If left out, 1 − α for one task, 0.5 for
            several.

    Raises:
        ValueError: If an argument is out of range; lists all that are.

    Example:
        >>> from lightning_drm import DRM
        >>> lines = LiNeS(DRM(), alpha=0.25, beta=0.5)
        >>> [lines.factor(depth) for depth in (0.0, 0.5, 1.0, None)]
        [0.25, 0.5, 0.75, 0.25]
    """

    elementwise: bool = True  # what is merged has its own shape again when it is scaled

    def __init__(self, method: Method, alpha: float | Literal["auto"] = "auto", beta: float | None = None) -> None:
        problems: list[str | None] = [
            None if isinstance(method, Method) else f"method must be a merging method, got {method!r}"
        ]
        if isinstance(method, LiNeS):
            problems.append("method must not be LiNeS again: one pair of alpha and beta says the same as two")
        if isinstance(method, Method) and method.propagate:
            problems.append(
                "method must not have propagate: its blocks go on from merged ones, which LiNeS scales afterwards"
            )
        if isinstance(alpha, str):
            problems.append(None if alpha == "auto" else f"alpha must be a number or 'auto', got {alpha!r}")
        else:
            problems.append(at_least_zero("alpha", alpha))
        if beta is not None:
            problems.append(at_least_zero("beta", beta))
        if alpha == beta == 0:
            problems.append("alpha and beta are both 0, which leaves nothing of the merge")
        refuse("LiNeS", problems)
        self.method = method
        self.alpha = alpha
        self.beta = beta
        self.scale = 1.0  # the factors take its place
        self._take_after(method)

    def of_model(self, num_tasks: int, norms: tuple[float, float] | None = None) -> LiNeS:
        r"""Find the numbers that are not given.

        Args:
            num_tasks: Number of tasks N.
            norms: :math:`\|\sum_t \lambda_t D_t\|_1` and :math:`\|D\|_1` over the whole model; needed for ``"auto"``.

        Returns:
            LiNeS with α and β as numbers. Where nothing was merged, α is 1.

        Raises:
            ValueError: If a norm is beyond float64.

        Example:
            The deltas of two tasks were added, so both norms are the same, and the first block gets their mean.

            >>> from lightning_drm import TaskArithmetic
            >>> LiNeS(TaskArithmetic(scale=1.0), beta=0.3).of_model(2, (6.0, 6.0))
            LiNeS(method=TaskArithmetic(scale=1.0), alpha=0.5, beta=0.3)
        """
        alpha = self.alpha
        if alpha == "auto":
            assert norms is not None, "alpha is to be taken from the norms"
            if not all(map(math.isfinite, norms)):
                raise ValueError("LiNeS: the deltas' entries add up to more than float64 holds; give alpha as a number")
            summed, merged = norms
            alpha = summed / merged / num_tasks if merged else 1.0
        beta = self.beta if self.beta is not None else 1 - alpha if num_tasks == 1 else BETA
        return self._with(alpha=alpha, beta=beta)

    def factor(self, depth: float | None) -> float:
        """The factor of a block.

        Args:
            depth: Where the block is, from 0.0 for the first to 1.0 for the last; None for what is in no block.

        Raises:
            ValueError: If α or β is no number yet.
        """
        if self.alpha == "auto" or self.beta is None:
            raise ValueError("LiNeS: a factor needs alpha and beta as numbers; of_model finds those that are not given")
        return self.alpha + self.beta * (depth or 0.0)

    def scaled(self, delta: AnyDelta, depth: float | None) -> AnyDelta:
        """A merged delta times its block's `factor`; of factors, the left one is multiplied.

        Args:
            delta: What `method` has merged, of any shape. It is not changed.
            depth: As for `factor`.
        """
        if isinstance(delta, LowRank):
            return type(delta)(delta.up * self.factor(depth), delta.down)
        return delta * self.factor(depth)

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        raise ValueError(_NEEDS_A_MODEL)

    def _merge_low_rank(self, deltas: list[LowRank], coefficients: list[float]) -> LowRank:
        raise ValueError(_NEEDS_A_MODEL)


_NEEDS_A_MODEL = (
    "LiNeS scales a parameter by the depth of its block, which a merge of tensors does not know: merge whole models, "
    "or scale what the method inside has merged, as in lines.scaled(lines.method.merge(deltas), depth=0.5)"
)
