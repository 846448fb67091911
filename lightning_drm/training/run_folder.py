"""The run folder: where a run keeps its tasks, its merged model and its report.

Files are written under another name and renamed, so what exists is whole, unless something damages it later. A task
counts as done once its ``metrics.json`` is there, which is written last, beside deltas that can be read. Several
processes may work in one run folder, each on tasks of its own: who works on a task, or reads it, locks it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from lightning_drm.deltas import (
    DELTAS_FILE,
    STATISTICS_FILE,
    StoredDeltas,
    TaskStatistics,
    TaskVector,
    load_task_vector,
    save_statistics,
    save_task_vector,
)
from lightning_drm.evaluation import MadeFrom, Score
from lightning_drm.kinds import MetricInfo
from lightning_drm.storage import only_one, write_json, writing
from lightning_drm.storage.json_files import read_object, shown

RECORD_FILE = "merge.json"
SCORED = ("individual", "base")
STATISTICS = "statistics"  # in the record of methods that need some: how they were collected
BATCH_NORM = "batch_norm"  # in the record of models with batch norms: what their statistics were estimated on
REPORT_FILES = ("report.json", "report.md", "report.png", "report.svg", "report.html")


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

    @property
    def analysis(self) -> Path:
        """Folder of what analyses found."""
        return self.path / "analysis"

    @property
    def merge_record(self) -> dict[str, Any] | None:
        """How ``merged/`` was made: method, base and deltas; ``None`` if that was not noted, or nothing is merged.

        Raises:
            ValueError: If the record is damaged.
        """
        path = self.merged / RECORD_FILE
        return read_object(path) if path.is_file() else None

    def put_aside(self, record: Mapping[str, Any]) -> None:
        """Moves the merged model and its report to the folder's history, to make room for one that is made otherwise.

        Args:
            record: The `merge_record` of the one that comes.
        """
        earlier = self.merge_record
        if not self.merged.is_dir() or earlier == json.loads(json.dumps(record)):  # as it will be read
            return
        place = self.history_of(earlier)
        place.mkdir(parents=True, exist_ok=True)
        for name in REPORT_FILES:  # before the model: after a kill in between, the next merge moves the rest
            if (self.path / name).is_file():
                (self.path / name).replace(place / name)
        if (place / "merged").is_dir():
            shutil.rmtree(place / "merged")
        self.merged.rename(place / "merged")

    def history_of(self, record: Mapping[str, Any] | None) -> Path:
        """Where a merge goes when another takes its place: under its method's name, and a hash of all that made it."""
        if record is None:
            return self.path / "history" / "unknown"
        name = str(record["method"]["class_path"]).rpartition(".")[2]
        digest = xxhash.xxh3_64(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
        return self.path / "history" / f"{name}-{digest}"

    def fingerprint(self, task: str) -> str | None:
        """What tells a task's stored deltas from others; ``None`` for files of older versions, which hold no hashes."""
        return StoredDeltas(self.task(task) / DELTAS_FILE).fingerprint

    def made_from(self, tasks: Sequence[str]) -> MadeFrom:
        """What a report, or a study, of these tasks is about, if it is made now."""
        return MadeFrom({t: self.fingerprint(t) for t in tasks}, {t: self._measured_on(t) for t in tasks})

    def _measured_on(self, task: str) -> str | None:
        """A fingerprint of what a task's scores depend on beside its deltas; ``None`` where there are none."""
        if not self.is_done(task):
            return None
        stored = self.read_metrics(task)
        noted = {name: stored[name] for name in ("test_set", "metrics", "module") if name in stored}
        return xxhash.xxh3_128(repr(noted).encode()).hexdigest()

    def task(self, task: str) -> Path:
        """Folder of one task."""
        return self.path / "tasks" / task

    def snapshot(self, task: str, num_steps: int) -> Path:
        """Folder of what a task's training had added to the base after some steps."""
        return self._snapshots(task) / str(num_steps)

    def snapshots(self, task: str) -> dict[int, TaskVector]:
        """By number of steps, in order, the snapshots of the finetune that a task has now."""
        if not self.has_task_vector(task):
            return {}
        end = self.load_task_vector(task)
        found = {step: load_task_vector(self.snapshot(task, step)) for step in self._snapshot_steps(task)}
        return {
            step: vector
            for step, vector in found.items()
            if (vector.settings, vector.base_hashes) == (end.settings, end.base_hashes)
        }

    def has_snapshot(self, task: str, num_steps: int) -> bool:
        """Whether a snapshot was taken, of the finetune that a task has now or of the one that it will have."""
        return num_steps in self._snapshot_steps(task)

    def remove_snapshots(self, task: str, *, after: int) -> None:
        """Removes a task's snapshots of more than some steps, before it is trained on from there."""
        for step in self._snapshot_steps(task):
            if step > after:
                folder = self.snapshot(task, step)
                with writing(folder):
                    _remove(folder / DELTAS_FILE)  # first, as a snapshot counts by it
                    shutil.rmtree(folder)

    def base_head(self, task: str) -> Path:
        """The head that was trained on the untouched base, where there is one."""
        return self.task(task) / "base_head.safetensors"

    def has_task_vector(self, task: str) -> bool:
        """Whether a task was finetuned and collected."""
        return (self.task(task) / DELTAS_FILE).is_file()

    def is_collected(self, task: str) -> bool:
        """Whether a task was finetuned and collected, and its files can be read; statistics can be taken again."""
        try:
            load_task_vector(self.task(task), statistics=False)
        except (OSError, ValueError, SafetensorError):
            return False
        return True

    def is_done(self, task: str) -> bool:
        """Whether a task was finetuned, collected and measured."""
        try:
            self.read_metrics(task)
        except (OSError, ValueError):
            return False
        return self.is_collected(task)

    def begin(self, task: str, settings: Mapping[str, Any]) -> None:
        """Notes that a task's finetuning begins; a finetune that was not measured yet makes room for it.

        Args:
            task: The task's name.
            settings: The hyper-parameters, by which a later fit knows whether it may go on.
        """
        if not self.is_done(task):
            _remove(self.task(task) / DELTAS_FILE)
        write_json(self._begun(task), settings)

    def begun(self, task: str) -> dict[str, Any] | None:
        """The settings of a finetuning that has begun and was not finished; ``None`` if there is none."""
        try:
            settings: dict[str, Any] = json.loads(self._begun(task).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return settings

    def missing(self, tasks: Sequence[str]) -> list[str]:
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
        folder = self.task(vector.task)  # the old deltas go first, or a kill could leave them beside the new head
        for outdated in (
            folder / "metrics.json",
            folder / DELTAS_FILE,
            folder / STATISTICS_FILE,
            self.base_head(vector.task),
        ):
            _remove(outdated)
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

    def save_statistics(self, task: str, statistics: TaskStatistics) -> None:
        """Stores what was collected of a task's data, beside its deltas."""
        save_statistics(statistics, self.task(task), task, self.fingerprint(task))

    def write_metrics(self, task: str, metrics: Mapping[str, Any]) -> None:
        """Stores a task's scores, which marks it as done.

        Args:
            task: The task's name.
            metrics: The scores of the ``individual`` and ``base`` models, and whatever else is to be kept with them.
        """
        plain = dict(metrics)
        for row in SCORED:
            score: Score | None = plain.pop(row)
            plain[row] = score.value if score is not None else None
            if score is not None:
                plain["metric"] = asdict(score.metric)
                plain[f"{row}_interval"] = score.interval
        write_json(self.task(task) / "metrics.json", plain)
        _remove(self._begun(task))

    def read_metrics(self, task: str) -> dict[str, Any]:
        """A done task's scores, as `write_metrics` got them.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.task(task) / "metrics.json"
        metrics = read_object(file)
        metric = _metric(file, metrics.pop("metric", None))
        for row in SCORED:
            value, interval = metrics.get(row), metrics.pop(f"{row}_interval", None)
            if not (_is_number(value) or (value is None and row == "base")):
                raise ValueError(f"{file}: expected a number for {row}, got {shown(value)}.")
            if interval is not None and not (
                isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))
            ):
                raise ValueError(f"{file}: expected two numbers for {row}_interval, got {shown(interval)}.")
            metrics[row] = Score(value, metric, tuple(interval) if interval else None) if value is not None else None
        return metrics

    def _snapshot_steps(self, task: str) -> list[int]:
        files = self._snapshots(task).glob(f"*/{DELTAS_FILE}")
        return sorted(int(file.parent.name) for file in files if file.parent.name.isdecimal())

    def _snapshots(self, task: str) -> Path:
        return self.task(task) / "snapshots"

    def _begun(self, task: str) -> Path:
        return self.task(task) / "begun.json"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metric(file: Path, stored: object) -> MetricInfo:
    if stored is None:  # older versions measured accuracy, and nothing else
        return MetricInfo("accuracy", is_fraction=True)
    kinds = {field.name: type(field.default) for field in fields(MetricInfo)} | {"name": str}
    if not isinstance(stored, dict) or {key: type(value) for key, value in stored.items()} != kinds:
        raise ValueError(f"{file}: expected {', '.join(kinds)} for metric, got {shown(stored)}.")
    return MetricInfo(**stored)


def _remove(file: Path) -> None:
    """Removes a file, if it is there."""
    with writing(file):
        file.unlink(missing_ok=True)
