"""How numbers stand in tables: one decimal, percentages without their sign."""

from collections.abc import Sequence

NOT_APPLICABLE = "n/a"


def shown(value: float | None, interval: Sequence[float] | None, is_fraction: bool) -> str:
    """A score with half of its interval.

    Args:
        value: The score; ``None`` where there is none.
        interval: Both ends of its interval, if that is known.
        is_fraction: Whether it is shown in percent.

    Example:
        >>> shown(0.84, (0.81, 0.86), True), shown(12.3456, None, False), shown(None, None, True)
        ('84.0 ±2.5', '12.35', 'n/a')
    """
    if value is None:
        return NOT_APPLICABLE
    half = (interval[1] - interval[0]) / 2 if interval else None
    if is_fraction:
        return f"{100 * value:.1f}" + (f" ±{100 * half:.1f}" if half is not None else "")
    return f"{value:.4g}" + (f" ±{half:.2g}" if half is not None else "")
