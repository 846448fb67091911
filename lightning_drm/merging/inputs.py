"""What a merge accepts, checked once and in one place, so that the methods can be plain mathematics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_drm.merging.low_rank import Delta, LowRank, LowRankStack
from lightning_drm.merging.scaling import peak


def refuse(owner: str, problems: Iterable[str | None]) -> None:
    """Raise one error that lists every problem.

    Args:
        owner: What the problems are about; opens the message.
        problems: Descriptions; None stands for no problem.

    Raises:
        ValueError: If there is any.
    """
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError(f"{owner}: {'; '.join(found)}")


def fraction(name: str, value: float, *, zero: bool, one: bool) -> str | None:
    """Problem with a number that should lie between 0 and 1; `zero` and `one` say whether the ends are allowed.

    Example:
        >>> fraction("density", 1.5, zero=False, one=True)
        'density must be in (0, 1], got 1.5'
    """
    if 0 < value < 1 or (zero and value == 0) or (one and value == 1):
        return None
    return f"{name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value!r}"


def finite(name: str, value: float) -> str | None:
    """Problem with a number that should be finite."""
    return None if math.isfinite(value) else f"{name} must be a finite number, got {value!r}"


def at_least_zero(name: str, value: float) -> str | None:
    """Problem with a number that should be finite, and 0 or more."""
    return None if math.isfinite(value) and value >= 0 else f"{name} must be a number of at least 0, got {value!r}"


def choice(name: str, value: object, options: Sequence[str]) -> str | None:
    """Problem with a word that should be one of `options`."""
    return None if value in options else f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}"


def check_deltas(owner: str, deltas: Sequence[Delta], *, matrices: bool) -> list[Delta]:
    """Refuse what cannot be merged, and bring the rest to the precision it is computed in.

    Args:
        owner: Name of the method, for the message.
        deltas: One delta for each task.
        matrices: Whether the method needs two dimensions.

    Returns:
        The deltas in one precision: float32 for half-precision inputs, else the widest among the inputs'. A stack of
        products is dense, since its entries are all that such a method looks at.

    Raises:
        ValueError: If there are no deltas, if one is not a real tensor or `LowRank`, is not finite or too large to be
            added to the others, or if shapes or devices differ; names the task's position.
    """
    deltas = list(deltas)
    if not deltas:
        raise ValueError(f"{owner}: there are no deltas to merge")
    refuse(owner, (_kind_problem(task, delta) for task, delta in enumerate(deltas)))
    first = deltas[0]
    refuse(owner, (_match_problem(task, delta, first) for task, delta in enumerate(deltas)))
    if matrices and len(first.shape) != 2:
        raise ValueError(f"{owner} merges matrices only, got deltas of shape {tuple(first.shape)}")
    dtype = torch.float32
    for delta in deltas:
        dtype = torch.promote_types(dtype, delta.dtype)
    refuse(owner, _value_problems(deltas, dtype))
    plain = [delta.dense() if isinstance(delta, LowRankStack) else delta for delta in deltas]
    return [delta.to(dtype) for delta in plain]


def check_coefficients(owner: str, coefficients: Sequence[float] | None, num_tasks: int) -> list[float]:
    """One finite coefficient for each task; 1.0 each by default.

    Raises:
        ValueError: If there are more or fewer than tasks, or one is not finite.
    """
    if coefficients is None:
        return [1.0] * num_tasks
    values = [float(value) for value in coefficients]
    if len(values) != num_tasks:
        raise ValueError(f"{owner}: {num_tasks} deltas need {num_tasks} coefficients, got {len(values)}")
    refuse(owner, (finite(f"coefficient of task {task}", value) for task, value in enumerate(values)))
    return values


def weights(owner: str, coefficients: Sequence[float]) -> list[float]:
    """Coefficients that weigh the tasks in a mean: over their sum.

    Raises:
        ValueError: If one is negative, or all are zero.

    Example:
        >>> weights("RegMean", [1.0, 3.0])
        [0.25, 0.75]
    """
    if min(coefficients) < 0 or not max(coefficients):
        raise ValueError(
            f"{owner} takes coefficients as weights of a mean: none below 0 and not all 0, got {list(coefficients)}"
        )
    largest = max(coefficients)  # their plain sum may be beyond the range of floats
    total = sum(value / largest for value in coefficients)
    return [value / largest / total for value in coefficients]


def check_thresholds(owner: str, thresholds: Sequence[float], num_tasks: int) -> Sequence[float]:
    """The thresholds that a method found when it was calibrated, one for each task.

    Raises:
        ValueError: If they are of another number of tasks.
    """
    if len(thresholds) != num_tasks:
        raise ValueError(f"{owner} was calibrated on {len(thresholds)} tasks, got {num_tasks} deltas")
    return thresholds


def _kind_problem(task: int, delta: object) -> str | None:
    if not isinstance(delta, Tensor | LowRank):
        return f"delta of task {task} must be a tensor or LowRank, got {type(delta).__name__}"
    return None if delta.dtype.is_floating_point else f"delta of task {task} must be floating point, got {delta.dtype}"


def _match_problem(task: int, delta: Delta, first: Delta) -> str | None:
    if delta.shape != first.shape:
        return f"delta of task {task} has shape {tuple(delta.shape)}, task 0 has {tuple(first.shape)}"
    if delta.device != first.device:
        return f"delta of task {task} is on {delta.device}, task 0 on {first.device}"
    return None


def _value_problems(deltas: Sequence[Delta], dtype: torch.dtype) -> list[str | None]:
    """Which deltas hold NaN or infinity, or have no sum. The largest magnitude shows it, and reads each entry once."""
    peaks = [peak(delta.up) + peak(delta.down) if isinstance(delta, LowRank) else peak(delta) for delta in deltas]
    limit = torch.finfo(dtype).max / (2 * len(deltas))
    problems: list[str | None] = []
    for task, size in enumerate(torch.stack(peaks).tolist()):  # one transfer for all tasks
        if not math.isfinite(size):
            problems.append(f"delta of task {task} holds NaN or infinite values")
        elif size > limit:
            problems.append(
                f"delta of task {task} reaches {size:.2g}, too large for a sum of {len(deltas)} in {_said(dtype)}"
            )
        else:
            problems.append(None)
    return problems


def check_result(owner: str, merged: Delta, deltas: Sequence[Delta]) -> None:
    """Refuse a merged delta that left the range of its precision.

    Raises:
        ValueError: If an entry is NaN or infinite; names the position of the task with the largest entry.
    """
    parts = [merged.up, merged.down] if isinstance(merged, LowRank) else [merged]
    if all(peak(part).isfinite() for part in parts):
        return
    peaks = torch.stack([peak(delta) for delta in deltas])
    raise ValueError(
        f"{owner}: the merged delta has entries beyond {_said(merged.dtype)}; the largest one that went in is "
        f"{float(peaks.max()):.2g}, of task {int(peaks.argmax())}, to be multiplied by coefficients and scale"
    )


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
