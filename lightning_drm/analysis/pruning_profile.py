r"""What pruning takes from each row of DRM's joint basis, with and without renormalization.

The study of Figure 3 of arXiv 2505.23117:

1. Decompose a matrix's deltas, :math:`[D_1 \cdots D_N] = U \Sigma V^T`, as DRM does, with its `rank_tol`.
2. Prune the rows of all tasks' :math:`V_t^T` at some density: as they are, and as unit rows
   :math:`\tilde V_t^T`.
3. A task's row i has n entries, and the joint row i, of all tasks, has N n. Their share dropped is the share of them
   that is zero then.

Rows are in the order of their singular values, the strongest first. Without renormalization, the row of a task that has
little part in a direction is short, and all of it may fall below the threshold. A row is said to vanish where that
happens. Entries of a task without any part in a direction count as dropped in both cases.

Cost: one decomposition, and four times two looks at each entry of the rows. Memory: a few copies of one parameter of
all tasks.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.matrices import Matrices, drm_of
from lightning_drm.evaluation import Candidates, Finding
from lightning_drm.evaluation.figures import COLORS, new_figure, percent
from lightning_drm.fusion import method_title
from lightning_drm.merging import DRM

TOP = 0.1
"""Share of the rows that a sentence calls the strongest."""

DROPPED = "dropped (fraction of the row)"


def dropped_shares(pruned: Sequence[Tensor]) -> Tensor:
    r"""Share of zeros in each row of each task.

    .. math:: d_{t,i} = \frac{1}{n} \left| \{ j : (P_t)_{ij} = 0 \} \right|

    Args:
        pruned: N pruned tensors :math:`P_t` of shape (r, n).

    Returns:
        The shares (N, r), in float64; their mean over tasks is the share of the joint row.

    Example:
        >>> dropped_shares([torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 3.0], [0.0, 4.0]])])
        tensor([[0.5000, 1.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    return torch.stack([(task == 0).double().mean(dim=1) for task in pruned])


class PruningProfile(Analysis):
    """Share of the entries that pruning drops from each row of the joint basis, with renormalization and without.

    Args:
        layer: The matrix that is looked at: a parameter's name, or a shell pattern, of which the first match is taken.
            The middle one of the model's depth if left out.
        dropped: Share of all entries that is pruned, beside the one that the method's density gives; half in
            the paper.

    Raises:
        ValueError: If the share is out of range.
    """

    name = "pruning_profile"

    def __init__(self, layer: str | None = None, dropped: float = 0.5) -> None:
        if not 0 < dropped < 1:
            raise ValueError(f"pruning_profile: dropped must be above 0 and below 1, got {dropped}.")
        self.layer = layer
        self.dropped = dropped

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        return Matrices(candidates.vectors, candidates.recipe, self.layer).problems()

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        method = drm_of(candidates.recipe)
        matrices = Matrices(candidates.vectors, candidates.recipe, self.layer)
        parameter = matrices.names[0 if self.layer is not None else len(matrices) // 2]
        layer, deltas = matrices.read(parameter)[0]
        basis = method.prepare(deltas)
        on_step(1, 2)
        strength = torch.linalg.vector_norm(basis.sigma.double(), dim=0)
        relative = (strength / strength.max()).tolist()
        table = pd.concat(
            pd.DataFrame(
                {
                    "layer": layer,
                    "pruned (fraction)": round(1 - setting.density, 12),
                    "renormalized": setting.renormalize,
                    "task": task,
                    "row": range(1, len(relative) + 1),
                    "singular value (fraction of the largest)": relative,
                    DROPPED: shares.tolist(),
                }
            )
            for setting in self._settings(method)
            for task, shares in zip(matrices.tasks, dropped_shares(setting.pruned(basis)), strict=True)
        )
        on_step(2, 2)
        shape = " × ".join(map(str, deltas[0].shape))
        title = f"Pruning profile of {layer}, {shape} ({method_title(method)})"
        return [Finding(self.name, title, _sentence(table, self.dropped), table, _figure(table, title))]

    def _settings(self, method: DRM) -> Iterator[DRM]:
        for density in sorted({round(1 - self.dropped, 12), method.density} - {1.0}, reverse=True):
            for renormalize in (False, True):
                setting = copy.copy(method)
                setting.density, setting.renormalize = density, renormalize
                yield setting


def _sentence(table: pd.DataFrame, pruned: float) -> str:
    at = table[table["pruned (fraction)"] == round(pruned, 12)]
    top = at[at["row"] <= math.ceil(TOP * at["row"].max())]
    plain, unit = (at.loc[at["renormalized"] == on, DROPPED] for on in (False, True))
    vanished = [
        (part.loc[part["renormalized"] == on, DROPPED] == 1).sum() for part in (top, at) for on in (False, True)
    ]
    return (
        f"At {100 * pruned:.0f} % pruning, a task's basis row loses {_range(plain)} of its entries without "
        f"renormalization and {_range(unit)} with it. Of the {len(top) // 2} rows in the strongest tenth of directions "
        f"{vanished[0]} vanish without it and {vanished[1]} with it, of all {len(plain)} rows {vanished[2]} and "
        f"{vanished[3]}."
    )


def _range(shares: pd.Series) -> str:
    return f"{100 * shares.min():.1f} to {100 * shares.max():.1f} %"


def _figure(table: pd.DataFrame, title: str) -> Figure:
    parts = list(table.groupby("pruned (fraction)"))
    figure, axes = new_figure(4.2 * len(parts), 3.8, columns=len(parts))
    figure.suptitle(title, fontsize=8)
    for plot, (pruned, part) in zip(axes, parts, strict=True):
        _draw(plot, part)
        plot.set_title(f"{100 * pruned:.0f} % of all entries pruned", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, title="joint row; band: the tasks' rows", title_fontsize=8)
    return figure


def _draw(plot: Axes, part: pd.DataFrame) -> None:
    for renormalized, label, color in ((False, "without renormalization", COLORS[5]), (True, "with it", COLORS[0])):
        rows = part[part["renormalized"] == renormalized].groupby("row")[DROPPED]
        joint, style = rows.mean(), "-" if renormalized else "--"
        plot.fill_between(joint.index, rows.min(), rows.max(), color=color, alpha=0.25, linewidth=0)
        plot.plot(joint.index, joint, color=color, linewidth=1.0, linestyle=style, label=label)
    plot.set_xlabel("basis row, the strongest first")
    plot.set_ylim(-0.02, 1.02)
    percent(plot, "entries dropped")
