"""The deltas that a run folder keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.task_input import Entry, Form, TaskInput
from lightning_drm.deltas import DELTAS_FILE, HEAD_FILE, STATISTICS_FILE, StoredDeltas, load_statistics, load_tensors
from lightning_drm.merging import Delta, LowRank


class StoredInput(TaskInput):
    """The stored deltas of one task: a run folder, or one of its task folders.

    Args:
        path: The task's folder.
        deltas: Its deltas.
        head: Its head.
    """

    format = "stored deltas"
    expected = "a run folder (tasks/<task>/deltas.safetensors) or one of its task folders"

    def __init__(self, path: Path, deltas: StoredDeltas, head: Mapping[str, Tensor]) -> None:
        statistics = load_statistics(path, deltas.fingerprint)
        super().__init__(path, [deltas.path, *([path / STATISTICS_FILE] if statistics is not None else [])])
        self.head, self._deltas, self.statistics = head, deltas, statistics
        self.base_hashes = deltas.base_hashes()
        for name, delta in deltas.headers.items():
            rank = delta.rank if isinstance(delta, LowRank) else 0
            form: Form = "low_rank" if isinstance(delta, LowRank) else "delta"
            self.entries[name] = Entry(tuple(delta.shape), delta.dtype, form, rank)

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        return path.name == DELTAS_FILE or (path / DELTAS_FILE).is_file() or any(path.glob(f"tasks/*/{DELTAS_FILE}"))

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        path = path.parent if path.name == DELTAS_FILE else path
        folder = path if (path / DELTAS_FILE).is_file() else path / "tasks" / task
        if not (folder / DELTAS_FILE).is_file():
            tasks = ", ".join(sorted(file.parent.name for file in path.glob(f"tasks/*/{DELTAS_FILE}")))
            raise ValueError(
                f"The run folder {path} has no task {task!r}, only {tasks}; name the task as the run does, or give the "
                f"path of its folder, such as {path}/tasks/{tasks.partition(', ')[0]}."
            )
        head = load_tensors(folder / HEAD_FILE, "a head") if (folder / HEAD_FILE).is_file() else {}
        return cls(folder, StoredDeltas(folder / DELTAS_FILE), head)

    @property
    @override
    def is_mapped(self) -> bool:
        return True

    @override
    def read(self, name: str) -> Delta:
        return self._deltas[name]
