"""Progress bars: which task is trained or tested, and how far a merge is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress
from typing_extensions import override

from lightning_drm.distributed.ranks import Ranks


class TaskProgressBar(RichProgressBar):
    """Lightning's progress bar with the task and the phase in front.

    Args:
        label: What to show, such as ``"topic · finetune"``.
    """

    def __init__(self, label: str) -> None:
        super().__init__(leave=True)
        self.label = label

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.label} · epoch {current_epoch}"

    @property
    @override
    def validation_description(self) -> str:
        return self.label

    @property
    @override
    def test_description(self) -> str:
        return self.label


@contextmanager
def merging_bar(methods: str, ranks: Ranks) -> Iterator[Callable[[int, int], None]]:
    """A bar that the first rank shows while all of them merge.

    Args:
        methods: What they merge with.
        ranks: The ranks.

    Yields:
        What to call with the number of parameters that are merged, and of those that will be.
    """
    with Progress(console=Console(stderr=True), disable=not ranks.is_first) as bar:
        row = bar.add_task(f"merging with {methods}", total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
