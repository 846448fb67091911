"""Checks of what was written: everything is finite, something of every task survived, and how much rounding took.

A whole model is measured as its parameters are written, on the values that end up in the file: base + merged delta,
rounded to the output's precision, at rows spread over each parameter. An adapter is small, so all of it is read back
and compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.low_rank import densify
from lightning_drm.merging.scaling import peak

TRACE = 1e-6  # less than this fraction of a task's delta is nothing but rounding
ABSURD = 1e6  # more than this fraction of it cannot come from merging
FAR, PARALLEL = 0.5, 0.8  # deltas so long, as a fraction of the base, and so alike hold the base itself
SAMPLE = 1 << 16  # entries of each parameter that are compared with each task
FEWEST_ROWS = 8  # of a parameter with very long rows


class Measured:
    """What one parameter contributes to the check, piece by piece.

    Args:
        tasks: The tasks' names.
        shape: The parameter's shape.
    """

    def __init__(self, tasks: Sequence[str], shape: tuple[int, ...]) -> None:
        self._tasks = tasks
        rows, width = (shape[0], prod(shape[1:])) if shape else (1, 1)
        self._step = max(1, rows // max(FEWEST_ROWS, SAMPLE // max(1, width)))
        self._overlap, self._energy = torch.zeros(2, len(tasks), dtype=torch.float64)
        self._sums: dict[str, float] = {}

    def add(self, exact: Tensor, written: Tensor, base: Tensor, deltas: Sequence[Delta], start: int = 0) -> None:
        """Measures a piece.

        Args:
            exact: Base plus merged delta, before rounding.
            written: The same, rounded.
            base: The base's values, in the precision of ``exact``.
            deltas: The tasks' deltas.
            start: How many rows come before the piece.
        """
        part = slice(-start % self._step, None, self._step)
        own = torch.stack([_rows(delta, part) for delta in deltas])
        before, after = _rows(base, part), _rows(written, part)
        change = after - before
        self._overlap += (own @ change).cpu()
        self._energy += own.square().sum(1).cpu()
        self._add(base=before, together=own.sum(0))
        if written.dtype != exact.dtype:
            precise = _rows(exact, part)
            self._add(rounding=after - precise, change=precise - before)

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.square().sum())

    def record(self) -> dict[str, Any]:
        """Plain numbers, which the journal keeps and `summary` sums up."""
        return {
            "overlap": dict(zip(self._tasks, self._overlap.tolist(), strict=True)),
            "energy": dict(zip(self._tasks, self._energy.tolist(), strict=True)),
            **self._sums,
        }


def _rows(delta: Delta, part: slice) -> Tensor:
    """Some rows of a parameter, end to end, in doubles."""
    if isinstance(delta, LowRank):
        return (delta.up[part] @ delta.down).reshape(-1).double()
    return (delta[part] if delta.shape else delta).reshape(-1).double()


def measure_factors(written: LowRank, tasks: Sequence[str], deltas: Sequence[Delta]) -> dict[str, Any]:
    """What one parameter of an adapter contributes to the check.

    Args:
        written: The merged factors, as they were written.
        tasks: The names of the tasks that change the parameter.
        deltas: Their deltas.

    Returns:
        Plain numbers, which `summary` sums up.
    """
    return {
        "overlap": {task: _inner(written, delta) for task, delta in zip(tasks, deltas, strict=True)},
        "energy": {task: _inner(delta, delta) for task, delta in zip(tasks, deltas, strict=True)},
    }


def _inner(one: Delta, other: Delta) -> float:
    """Σ_ij A_ij B_ij; of two products from their factors, as tr(Aᵀ B) = Σ (U₁ᵀ U₂) ∘ (D₁ D₂ᵀ)."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        sides = one.up.T.double() @ other.up.double(), one.down.double() @ other.down.T.double()
        return float((sides[0] * sides[1]).sum())
    return float((densify(one).double() * densify(other).double()).sum())


@dataclass(frozen=True)
class Checked:
    """What the check of a whole merge found.

    Attributes:
        survived: By task, the fraction of its delta that survived; NaN for a task whose deltas are all zero.
        rounding: Size of the rounding error, relative to the merged delta.
        notes: What a user should know.
    """

    survived: Mapping[str, float]
    rounding: float
    notes: tuple[str, ...]


def summary(records: Iterable[Mapping[str, Any]], plan: Plan) -> Checked:
    """Sums up a merge.

    Args:
        records: From `Measured` or `measure_factors`, one for each parameter.
        plan: What was to be merged.

    Raises:
        ValueError: If nothing of a task survived, or an absurd multiple of it; names the tasks.
    """
    records = [record for record in records if "overlap" in record]
    tasks = [task.name for task in plan.tasks]
    overlap, energy = (
        {task: math.fsum(record[key].get(task, 0.0) for record in records) for task in tasks}
        for key in ("overlap", "energy")
    )
    survived = {task: overlap[task] / energy[task] if energy[task] else math.nan for task in tasks}
    _require_present(plan, survived)
    notes = [f"{task}: all its deltas are zero." for task, fraction in survived.items() if math.isnan(fraction)]
    if _holds_another_base([record for record in records if "base" in record], list(energy.values())):
        notes.append(
            f"{plan.base.name} may be the wrong base: the deltas are about as long as its own weights"
            f"{', and nearly the same in all tasks' if len(tasks) > 1 else ''}."
        )
    change, rounding = (math.fsum(record.get(key, 0.0) for record in records) for key in ("change", "rounding"))
    return Checked(survived, (rounding / change) ** 0.5 if change else 0.0, tuple(notes))


def _holds_another_base(records: Sequence[Mapping[str, Any]], energies: Sequence[float]) -> bool:
    """Whether the tasks' deltas hold the difference of two bases.

    Then they are about as long as the base itself, and nearly parallel. Finetunes of the right base move it by a few
    per cent, each in its own direction.
    """
    base, together = (math.fsum(record[key] for record in records) for key in ("base", "together"))
    if not base or min(energies) < FAR**2 * base:
        return False
    # The mean cosine of two tasks: |Σ d|² = Σ |d|² + Σ_{s ≠ t} d_s · d_t.
    alone, pairs = sum(energies), sum(map(math.sqrt, energies)) ** 2 - sum(energies)
    return len(energies) == 1 or together - alone > PARALLEL * pairs


def require_finite(name: str, written: Tensor, exact: Tensor | None = None) -> float:
    """Refuses values that are not finite.

    Args:
        name: The parameter.
        written: Its merged value, as it is written.
        exact: The same before rounding, if it was rounded.

    Returns:
        The largest magnitude that was written.

    Raises:
        ValueError: If a value is not finite, or became infinite by rounding.
    """
    largest = float(peak(written))
    if math.isfinite(largest):
        return largest
    if exact is not None:
        require_fits(name, written, exact)
    raise ValueError(f"{name} is not finite after merging: the base or a finetune holds NaN or infinite values there.")


def require_fits(name: str, written: Tensor, exact: Tensor) -> None:
    """Refuses values that became infinite by rounding.

    Args:
        name: The parameter.
        written: Its value, as it is written.
        exact: The same before rounding.

    Raises:
        ValueError: If a finite value became infinite; says how large it is.
    """
    is_finite = exact.isfinite()
    if not torch.equal(written.isfinite(), is_finite):
        largest = exact[is_finite].abs().max()
        raise ValueError(f"{name} does not fit into {written.dtype}: it has a value of {largest:.3g}.")


def require_plausible(name: str, largest: float, base: Tensor, tasks: Sequence[str], deltas: Sequence[Delta]) -> None:
    """Refuses weights that are far beyond those of any network, as one damaged entry of a finetune makes them.

    Args:
        name: The parameter.
        largest: The largest magnitude that was written.
        base: The base's values.
        tasks: The tasks' names.
        deltas: Their deltas.

    Raises:
        ValueError: If the largest weight is more than `ABSURD` times 1 and the base's own; names the tasks.
    """
    if largest <= ABSURD or largest <= ABSURD * float(peak(base)):  # the base is looked at in rare cases only
        return
    sizes = {task: float(peak(delta)) for task, delta in zip(tasks, deltas, strict=True)}
    changed = ", ".join(f"{task} changes it by {size:.2g}" for task, size in sizes.items() if size > ABSURD)
    raise ValueError(
        f"{name} would reach {largest:.2g}, where the base has at most {float(peak(base)):.2g}: "
        f"{changed or 'the method or a coefficient blows it up'}."
    )


def _require_present(plan: Plan, survived: Mapping[str, float]) -> None:
    active = {
        task.name
        for index, task in enumerate(plan.tasks)
        if any(treatment.method is not None and treatment.coefficients[index] for treatment in plan.treatments.values())
    }
    absurd = [f"{100 * fraction:.1e} % of {task}" for task, fraction in survived.items() if abs(fraction) > ABSURD]
    if absurd:
        raise ValueError(
            f"The merged weights hold {', '.join(absurd)}, which no merge gives: finetunes with values of extreme size "
            "were merged, or a method or coefficient blows them up."
        )
    gone = [task for task, fraction in survived.items() if abs(fraction) < TRACE and task in active]
    if gone and plan.recipe.inner_method.scale:
        raise ValueError(
            f"Nothing of task {', '.join(gone)} is left in the merged weights: its deltas were pruned away or are "
            "smaller than the output's rounding; use a higher density or rank, or dtype float32."
        )
