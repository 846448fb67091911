"""Checks of what was written: everything is finite, something of every task survived, and how much rounding took.

A whole model is measured as its parameters are written, on the values that end up in the file: base + merged delta,
rounded to the output's precision. An adapter is small, so all of it is read back and compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.merging import Delta, LowRank
from lightning_drm.merging.low_rank import densify

TRACE = 1e-6  # less than this fraction of a task's delta is nothing but rounding
SAMPLE = 1 << 16  # entries of each parameter that are compared with each task


def measure(
    exact: Tensor, written: Tensor, base: Tensor, tasks: Sequence[str], deltas: Sequence[Delta]
) -> dict[str, Any]:
    """What one parameter contributes to the check.

    Args:
        exact: Base plus merged delta, before rounding.
        written: The same, rounded.
        base: The base's values, in the precision of ``exact``.
        tasks: The tasks' names.
        deltas: Their deltas.

    Returns:
        Plain numbers, which the journal keeps and `summary` sums up.
    """
    change = _sample(written.to(exact.dtype)) - _sample(base)
    own = [_sample(delta) for delta in deltas]
    record: dict[str, Any] = {
        "overlap": {task: float(change @ delta) for task, delta in zip(tasks, own, strict=True)},
        "energy": {task: float(delta @ delta) for task, delta in zip(tasks, own, strict=True)},
    }
    if written.dtype != exact.dtype:
        error = (_sample(written.to(exact.dtype)) - _sample(exact)).norm()
        record["rounding"] = float(error**2)
        record["change"] = float(((_sample(exact) - _sample(base)).norm()) ** 2)
    return record


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


def summary(records: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[dict[str, float], float]:
    """Sums up a merge.

    Args:
        records: From `measure`, one for each parameter.
        tasks: The tasks' names.

    Returns:
        By task, the fraction of its delta that survived (NaN for a task whose deltas are all zero), and the size of the
        rounding error relative to the merged delta.
    """
    records = [record for record in records if "overlap" in record]
    survived = {}
    for task in tasks:
        energy = sum(record["energy"].get(task, 0.0) for record in records)
        overlap = sum(record["overlap"].get(task, 0.0) for record in records)
        survived[task] = overlap / energy if energy else float("nan")
    change = sum(record.get("change", 0.0) for record in records)
    rounding = sum(record.get("rounding", 0.0) for record in records)
    return survived, (rounding / change) ** 0.5 if change else 0.0


def require_finite(name: str, written: Tensor, exact: Tensor | None = None) -> None:
    """Refuses values that are not finite.

    Args:
        name: The parameter.
        written: Its merged value, as it is written.
        exact: The same before rounding, if it was rounded.

    Raises:
        ValueError: If a value is not finite, or became infinite by rounding.
    """
    if _is_finite(written):
        return
    if exact is not None and _is_finite(exact):
        raise ValueError(f"{name} does not fit into {written.dtype}: it has a value of {exact.abs().max():.3g}.")
    raise ValueError(f"{name} is not finite after merging: the base or a finetune holds NaN or infinite values there.")


def _is_finite(tensor: Tensor) -> bool:
    """Looks at the extremes, which reads every entry once and writes nothing."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def require_present(plan: Plan, survived: Mapping[str, float]) -> None:
    """Refuses a result in which nothing of a task survived.

    Args:
        plan: What was to be merged.
        survived: From `summary`.

    Raises:
        ValueError: Naming the tasks.
    """
    active = {
        task.name
        for index, task in enumerate(plan.tasks)
        if any(treatment.method is not None and treatment.coefficients[index] for treatment in plan.treatments.values())
    }
    gone = [task for task, fraction in survived.items() if abs(fraction) < TRACE and task in active]
    if gone and plan.recipe.method.scale:
        raise ValueError(
            f"Nothing of task {', '.join(gone)} is left in the merged weights: its deltas were pruned away or are "
            "smaller than the output's rounding; use a higher density or rank, or dtype float32."
        )


def _sample(delta: Delta) -> Tensor:
    if not delta.shape:
        assert isinstance(delta, Tensor)
        return delta.reshape(1).double()
    # Whole rows, so that a large tensor is not copied.
    rows = -(-SAMPLE // max(1, prod(delta.shape[1:])))
    first = delta.up[:rows] @ delta.down if isinstance(delta, LowRank) else delta[:rows]
    return first.reshape(-1)[:SAMPLE].double()
