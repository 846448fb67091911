"""One task's fit among several: a Trainer of its own, which logs and keeps its checkpoints under the task's name."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_drm.storage import written_whole
from lightning_drm.training.resuming import REQUEUED, ResumePoint, is_of_fit, last_checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place, where Lightning would take room for them in the system's temporary folder.

    A checkpoint is whole or not there, and one that cannot be written is named.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):  # not on a disk
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(Path(path)) as place, place.open("wb") as file:
            torch.save(checkpoint, file)


class TaskFit:
    """Makes a task's Trainer, and knows the checkpoints that an earlier one left.

    Args:
        task: The task's name.
        folder: The task's folder, where checkpoints are kept unless the user names another place; there, they get a
            folder of the task's name.
        arguments: Arguments of the Trainer that the user gave, which hold for every task.
        callbacks: The user's callbacks; each task has copies of them.
        settings: The fit's settings, by which its checkpoints are told from those of other runs.
    """

    def __init__(
        self,
        task: str,
        folder: Path,
        arguments: Mapping[str, Any],
        callbacks: Sequence[Callback],
        settings: Mapping[str, Any],
    ) -> None:
        self._task, self._folder, self._settings = task, folder, settings
        self._arguments = dict(arguments)
        given = self._arguments.get("default_root_dir")
        self.root = Path(given) / task if given is not None else folder
        self._callbacks = [copy.deepcopy(callback) for callback in callbacks]
        saving = [callback for callback in self._callbacks if isinstance(callback, Checkpoint)]
        switched_off = self._arguments.get("enable_checkpointing") is False or self._arguments.get("barebones")
        if not saving and not switched_off:
            saving = [ModelCheckpoint()]  # Lightning's own default, which would save beside the logs
            self._callbacks += saving
        self._checkpoints = {self.root / "checkpoints"}
        for callback in saving:
            if hasattr(callback, "dirpath"):
                place = Path(callback.dirpath) / task if callback.dirpath is not None else folder / "checkpoints"
                callback.dirpath = str(place)
                self._checkpoints.add(place)

    def trainer(self, callbacks: Sequence[Callback]) -> Trainer:
        """A fresh Trainer, since one fits once.

        Args:
            callbacks: What it calls beside the user's callbacks.
        """
        arguments = {
            **self._arguments,
            "default_root_dir": self.root,
            "strategy": copy.deepcopy(self._arguments["strategy"]),
            "callbacks": [*self._callbacks, *callbacks, ResumePoint(self._settings)],
        }
        if arguments.get("logger"):
            arguments["logger"] = self._own_loggers(arguments["logger"])
        trainer = Trainer(**arguments)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def last_checkpoint(self) -> Path | None:
        """The checkpoint from which an interrupted fit goes on, if there is one."""
        return last_checkpoint([self.root, *sorted(self._checkpoints)], self._settings)

    def requeued(self) -> set[Path]:
        """The checkpoints of jobs that Lightning put back into SLURM's queue."""
        return set(self.root.glob(REQUEUED))

    def remove_checkpoints(self) -> None:
        """Removes what earlier fits of the task left, before one begins anew; what may be another run's stays."""
        for path in [*self.requeued(), *(path for folder in self._checkpoints for path in folder.glob("*.ckpt"))]:
            if not path.is_relative_to(self._folder) and not is_of_fit(path, self._settings):
                continue
            if path.is_dir():  # sharded
                shutil.rmtree(path)
            else:
                path.unlink()

    def _own_loggers(self, given: Any) -> Any:
        """Copies of the user's loggers; those that write folders get one of the task's name."""
        if isinstance(given, Sequence):
            return [self._own_loggers(logger) for logger in given]
        logger = copy.deepcopy(given)
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            logger._name = str(Path(logger.name) / self._task)  # there is no setter, and no way to make one again
        assert isinstance(logger, Logger | bool)
        return logger
