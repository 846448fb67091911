"""A progress bar that says which task it is about and what is being done with it."""

from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


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
    def test_description(self) -> str:
        return self.label
