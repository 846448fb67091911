"""How far a search is."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_drm.tuning.search import OnTrial
from lightning_drm.tuning.space import setting_title
from lightning_drm.tuning.trial import Trial


@contextmanager
def tuning_bar(*, shown: bool) -> Iterator[OnTrial]:
    """A bar that shows how many settings were tried, and the best one so far.

    Args:
        shown: Whether it is shown at all.

    Yields:
        What to call with the number of settings that were tried, of all that will be, and the best trial.
    """
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        row = bar.add_task("tuning", total=None)

        def advance(done: int, total: int, best: Trial | None) -> None:
            said = "" if best is None else f" · best {100 * best.reached:.1f} %: {setting_title(best.recipe)}"
            bar.update(row, completed=done, total=total, description=escape(f"tuning{said}"))

        yield advance
