r"""The singular values of each task's delta and of the joint matrix, and how they bound each other.

1. For each matrix, take the singular values of every :math:`D_t` and of the joint matrix that DRM decomposes:
   :math:`J = [D_1 \cdots D_N]` (horizontal), or the vertical stack. Low-rank deltas are written in one basis of their
   columns first, which changes no singular value.
2. Numerical rank: the number of singular values above rounding noise. Rank and energy kept: the number of those above
   ``rank_tol`` times the largest, and their share of :math:`\sum_i \sigma_i^2`.
3. Check the bounds of appendix D of arXiv 2505.23117, for every i, task and matrix:

   .. math:: \sigma_i(D_t) \le \sigma_i(J), \qquad
       \sigma_i(J)^2 \le \sigma_i(D_t)^2 + \sum_{s \ne t} \sigma_1(D_s)^2

The first holds because :math:`J J^T = \sum_s D_s D_s^T`, and adding positive semidefinite matrices to
:math:`D_t D_t^T` lowers no eigenvalue. The second is Weyl's inequality, :math:`\lambda_i(A + B) \le \lambda_i(A) +
\lambda_1(B)`, with :math:`A = D_t D_t^T`. The slack of a bound is its right side minus its left one, over
:math:`\sigma_1(J)`, squared in the second: it shows how much the joint matrix gains over each task. Singular values
from Gram matrices are off by up to 1e-8 of the largest, so a slack counts as negative below `ROUNDING` only.

Cost: N eigenproblems of the tasks' shorter side and one of the joint matrix', each with its Gram matrix. Memory: one
parameter of all tasks, and a Gram matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.matrices import Matrices, drm_of
from lightning_drm.evaluation import Candidates, Finding
from lightning_drm.evaluation.figures import new_figure, percent, style_of
from lightning_drm.evaluation.short_names import short_names
from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.joint_basis import Direction
from lightning_drm.merging.linalg.spectral import gram, rank_tolerance
from lightning_drm.merging.low_rank import densify, row_coordinates

JOINT = "joint"

ROUNDING = 1e-7
"""How far below zero a slack may be by rounding alone."""


def singular_values(matrices: Sequence[Tensor]) -> Tensor:
    """The singular values of matrices side by side, the largest first, in float64.

    Those of float32 matrices come from a Gram matrix in float64, which is exact to 1e-8 of the largest; those of
    float64 matrices from an SVD.

    Args:
        matrices: Matrices of shape (m, n), one or more of the same m.

    Returns:
        Singular values (min(m, N n),).

    Example:
        >>> singular_values([torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0], [0.0]])])
        tensor([5., 1.], dtype=torch.float64)
    """
    height, width = len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)
    if matrices[0].dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(torch.cat(list(matrices), dim=1))
        return values
    squares = gram(matrices if height <= width else [torch.cat(list(matrices), dim=1).T])
    eigenvalues: Tensor = torch.linalg.eigvalsh(squares, UPLO="U")
    return eigenvalues.flip(0).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Spectra:
    """Singular values of one matrix' deltas, in float64.

    Attributes:
        tasks: One tensor for each task.
        joint: Those of the joint matrix.
        noise: The fraction of the largest that is rounding noise.
    """

    tasks: tuple[Tensor, ...]
    joint: Tensor
    noise: float

    @classmethod
    def of(cls, deltas: Sequence[Delta], direction: Direction) -> "Spectra":
        """The spectra of N deltas of one shape.

        Args:
            deltas: N matrices (m, n), dense, low-rank or both.
            direction: How the joint matrix stacks them.

        Example:
            >>> spectra = Spectra.of([torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])], "horizontal")
            >>> spectra.joint.square().round(decimals=6)
            tensor([2., 1.], dtype=torch.float64)
            >>> [abs(round(slack, 6)) for slack in spectra.smallest_slacks()]
            [0.0, 0.0]
        """
        noise = rank_tolerance(deltas[0].shape, deltas[0].dtype)
        sides = [delta.T for delta in deltas] if direction == "vertical" else deltas
        factors = [side for side in sides if isinstance(side, LowRank)]
        matrices = row_coordinates(factors)[1] if len(factors) == len(sides) else [densify(side) for side in sides]
        return cls(tuple(singular_values([matrix]) for matrix in matrices), singular_values(matrices), noise)

    def smallest_slacks(self) -> tuple[float, float]:
        """The smallest slack of the first and of the second bound; zeros where all deltas are zero."""
        top = float(self.joint[0])
        if top == 0:
            return 0.0, 0.0
        largest = torch.stack([values[0].square() for values in self.tasks])
        lower, upper = [], []
        for task, values in enumerate(self.tasks):
            full = torch.nn.functional.pad(values, (0, len(self.joint) - len(values)))  # D_t has no more of them
            lower.append(float((self.joint - full).min()) / top)
            others = largest.sum() - largest[task]
            upper.append(float((full.square() + others - self.joint.square()).min()) / top**2)
        return min(lower), min(upper)


class Spectrum(Analysis):
    """Singular values of each task's delta and of the joint matrix, ranks, energy kept, and bounds between them.

    Args:
        layers: A parameter's name, or a shell pattern for several, whose singular values are shown in full, at most
            four of them. The first, the middle and the last matrix of the model's depth if left out.
    """

    name = "spectrum"

    def __init__(self, layers: str | None = None) -> None:
        self.layers = layers

    @override
    def problems(self, candidates: Candidates) -> list[str]:
        matrices = Matrices(candidates.vectors, candidates.recipe, self.layers)
        problems = matrices.problems()
        if self.layers is not None and len(matrices) > 4:
            problems.append(f"{self.layers!r} matches {len(matrices)} matrices, and a figure shows 4.")
        return problems

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        method = drm_of(candidates.recipe)
        matrices = Matrices(candidates.vectors, candidates.recipe)
        shown = self._shown(candidates, matrices.names)
        chosen: dict[str, Spectra] = {}
        rows: list[dict[str, object]] = []
        for done, (name, deltas) in enumerate(matrices, 1):
            spectra = Spectra.of(deltas, method.direction)
            rows += _summary(name, matrices.tasks, spectra, method.rank_tol)
            if name.partition("[")[0] in shown and len(chosen) < 4:
                chosen[name] = spectra
            on_step(min(done, len(matrices)), len(matrices))
        summary = pd.DataFrame(rows)
        setting = f"({method.direction}, rank_tol {method.rank_tol:g})"
        values = f"Singular values of deltas {setting}"
        ranks = f"Rank and energy of deltas {setting}"
        return [
            Finding(
                "spectrum",
                values,
                _told_bounds(summary),
                pd.DataFrame(_values(chosen, matrices.tasks)),
                _figure_of_values(chosen, matrices.tasks, method.rank_tol, values),
            ),
            Finding(
                "spectrum_ranks",
                ranks,
                _told_ranks(summary, method.rank_tol),
                summary,
                _figure_of_ranks(summary, ranks),
            ),
        ]

    def _shown(self, candidates: Candidates, names: Sequence[str]) -> set[str]:
        if self.layers is not None:
            return set(Matrices(candidates.vectors, candidates.recipe, self.layers).names)
        return {names[0], names[len(names) // 2], names[-1]}


def _summary(name: str, tasks: Sequence[str], spectra: Spectra, rank_tol: float) -> Iterator[dict[str, object]]:
    slacks = spectra.smallest_slacks()
    for owner, values in zip([*tasks, JOINT], [*spectra.tasks, spectra.joint], strict=True):
        top, energy = float(values[0]), float(values.square().sum())
        kept = values > max(rank_tol, spectra.noise) * top
        yield {
            "matrix": name,
            "of": owner,
            "largest singular value": top,
            "singular values": len(values),
            "numerical rank": int((values > spectra.noise * top).sum()),
            "rank kept by rank_tol": int(kept.sum()),
            "energy kept by rank_tol (fraction)": float(values[kept].square().sum()) / energy
            if energy
            else float("nan"),
            "stable rank": energy / top**2 if top else 0.0,
            "smallest slack of the first bound": slacks[0] if owner == JOINT else None,
            "smallest slack of the second bound": slacks[1] if owner == JOINT else None,
        }


def _values(chosen: Mapping[str, Spectra], tasks: Sequence[str]) -> Iterator[dict[str, object]]:
    for name, spectra in chosen.items():
        for owner, values in zip([*tasks, JOINT], [*spectra.tasks, spectra.joint], strict=True):
            for index, value in enumerate(values.tolist(), 1):
                yield {"matrix": name, "of": owner, "index": index, "singular value": value}


def _told_bounds(summary: pd.DataFrame) -> str:
    joint = summary[summary["of"] == JOINT]
    first, second = (joint[f"smallest slack of the {which} bound"] for which in ("first", "second"))
    broken = int(((first < -ROUNDING) | (second < -ROUNDING)).sum())
    verdict = f"hold in all {len(joint)} matrices" if not broken else f"fail in {broken} of {len(joint)} matrices"
    return (
        f"Appendix D's bounds {verdict}: no singular value of a task is above that of the joint matrix at the same "
        f"place (smallest slack {first.min():.1e} of the largest one), and the joint one's square is at most the "
        f"task's plus the others' largest ones (smallest slack {second.min():.1e} of the largest square)."
    )


def _told_ranks(summary: pd.DataFrame, rank_tol: float) -> str:
    joint, tasks = summary[summary["of"] == JOINT], summary[summary["of"] != JOINT]
    kept, energy = "rank kept by rank_tol", "energy kept by rank_tol (fraction)"
    return (
        f"rank_tol {rank_tol:g} keeps {joint[kept].sum()} of the joint matrices' {joint['numerical rank'].sum()} "
        f"directions (numerical rank) and {100 * joint[energy].mean():.2f} % of their energy "
        f"(at least {100 * joint[energy].min():.2f} %). Their stable rank is {joint['stable rank'].median():.1f} "
        f"(median), that of a task's delta {tasks['stable rank'].median():.1f}."
    )


def _figure_of_values(chosen: Mapping[str, Spectra], tasks: Sequence[str], rank_tol: float, title: str) -> Figure:
    figure, axes = new_figure(3.4 * len(chosen) + 0.6, 3.8, columns=len(chosen))
    figure.suptitle(title, fontsize=9)
    short = short_names(chosen)
    for plot, (name, spectra) in zip(axes, chosen.items(), strict=True):
        top = float(spectra.joint[0])
        for index, (task, values) in enumerate(zip(tasks, spectra.tasks, strict=True)):
            plot.plot(range(1, len(values) + 1), values, color=style_of(index)["color"], linewidth=1, label=task)
        plot.plot(range(1, len(spectra.joint) + 1), spectra.joint, color="k", linewidth=1.6, label=JOINT)
        plot.axhline(rank_tol * top, color="0.4", linestyle=":", linewidth=1, label="rank_tol × largest")
        plot.set_yscale("log")
        plot.set_ylim(bottom=max(rank_tol, 1e-6) * top / 30)
        plot.set_title(short[name], fontsize=8)
        plot.set_xlabel("index")
    axes[0].set_ylabel("singular value")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _figure_of_ranks(summary: pd.DataFrame, title: str) -> Figure:
    figure, axes = new_figure(8.4, 3.8, columns=2)
    figure.suptitle(title, fontsize=9)
    for index, (owner, part) in enumerate(summary.groupby("of", sort=False)):
        look = {"color": "k", "marker": "x"} if owner == JOINT else style_of(index)
        places = range(1, len(part) + 1)
        axes[0].plot(places, part["stable rank"], linestyle="", markersize=4, label=owner, **look)
        axes[1].plot(
            places, part["energy kept by rank_tol (fraction)"], linestyle="", markersize=4, label=owner, **look
        )
    for plot in axes:
        plot.set_xlabel("matrix, in the order of depth")
    axes[0].set_ylabel("stable rank: energy over the largest σ²")
    percent(axes[1], "energy kept by rank_tol")
    axes[0].legend(fontsize=7, frameon=False)
    return figure
