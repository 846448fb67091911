"""Progress bars: which task is trained or tested, and how far a merge is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
    """A bar that the first rank shows while all of them merge; none in a notebook.

    Args:
        methods: What they merge with.
        ranks: The ranks.

    Yields:
        What to call with the number of parameters that are merged, and of those that will be.
    """
    console = Console(stderr=True)
    # In a notebook, rich draws a bar only with ipywidgets, and otherwise warns at each turn.
    with Progress(console=console, disable=not ranks.is_first or console.is_jupyter) as bar:
        row = bar.add_task(f"merging with {methods}", total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


class AnalysisBar:
    """Shows which analysis is run, and how far it is, below what is printed meanwhile.

    Args:
        console: Where sentences are printed; there is no bar where that is no terminal.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._all = self._progress.add_task("analyses", total=None)
        self._one = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str, num_done: int, num_all: int) -> None:
        """An analysis begins.

        Args:
            name: Its name.
            num_done: How many were run before it.
            num_all: How many will be run.
        """
        self._progress.update(self._all, completed=num_done, total=num_all)
        self._progress.reset(self._one, description=name, total=None)

    def step(self, num_done: int, num_all: int) -> None:
        """The analysis has come further.

        Args:
            num_done: How many of its steps are done.
            num_all: How many there are.
        """
        self._progress.update(self._one, completed=num_done, total=num_all)
