"""A progress bar that says which task it is about and what is being done with it."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override


class TaskProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the task and the phase in front.

    Args:
        label: What to show, such as ``"topic · finetune"``.
    """

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    @property
    @override
    def train_description(self) -> str:
        return self.label

    @property
    @override
    def test_description(self) -> str:
        return self.label

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"{self.label} · epoch {trainer.current_epoch}")
