"""The run folder: where a run keeps its tasks, its merged model and its report.

Files are written under another name and renamed, so what exists is whole. A task counts as done once its
``metrics.json`` is there: it is written last. Several processes may work in one run folder, each on tasks of its own:
who works on a task, or reads it, locks it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_drm.deltas import DELTAS_FILE, TaskVector, load_task_vector, save_task_vector
from lightning_drm.storage import only_one, write_json
from lightning_drm.storage.json_files import read_object, shown


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder; made when something is first written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.path / "merged"

    @property
    def config(self) -> Path:
        """The configuration that the run was started with."""
        return self.path / "config.yaml"

    def task(self, task: str) -> Path:
        """Folder of one task."""
        return self.path / "tasks" / task

    def base_head(self, task: str) -> Path:
        """The head that was trained on the untouched base, where there is one."""
        return self.task(task) / "base_head.safetensors"

    def has_task_vector(self, task: str) -> bool:
        """Whether a task was finetuned and collected."""
        return (self.task(task) / DELTAS_FILE).is_file()

    def is_done(self, task: str) -> bool:
        """Whether a task was finetuned, collected and measured."""
        return (self.task(task) / "metrics.json").is_file()

    def missing(self, tasks: list[str]) -> list[str]:
        """Those of the tasks that are not done."""
        return [task for task in tasks if not self.is_done(task)]

    @contextmanager
    def locked(self, tasks: Sequence[str]) -> Iterator[None]:
        """Keeps other processes from these tasks.

        Args:
            tasks: Their names.

        Raises:
            ValueError: If another process works on one of them, naming it.
        """
        with ExitStack() as locks:
            for task in sorted(tasks):
                locks.enter_context(only_one(self.task(task), f"at work on task {task!r} of {self.path}"))
            yield

    def save_task_vector(self, vector: TaskVector) -> None:
        """Stores a task vector; the task is not done before `write_metrics`."""
        for outdated in (self.task(vector.task) / "metrics.json", self.base_head(vector.task)):
            outdated.unlink(missing_ok=True)
        save_task_vector(vector, self.task(vector.task))

    def load_task_vector(self, task: str) -> TaskVector:
        """Opens a stored task vector.

        Args:
            task: The task's name.

        Raises:
            FileNotFoundError: If the task was not finetuned in this run folder.
        """
        if not self.has_task_vector(task):
            raise FileNotFoundError(f"{self.task(task)} holds no deltas of task {task!r}: finetune it first.")
        return load_task_vector(self.task(task))

    def write_metrics(self, task: str, metrics: Mapping[str, Any]) -> None:
        """Stores a task's accuracies, which marks it as done."""
        write_json(self.task(task) / "metrics.json", metrics)

    def read_metrics(self, task: str) -> dict[str, Any]:
        """A done task's accuracies.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.task(task) / "metrics.json"
        metrics = read_object(file)
        for name, kinds in (("individual", int | float), ("base", int | float | None)):
            value = metrics.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{file}: expected a number for {name}, got {shown(value)}.")
        return metrics
