"""The folder that a merge writes: hidden until it is whole and checked, and then shown under its name."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from lightning_drm.checkpoints.planning import Plan, disk_bytes
from lightning_drm.checkpoints.writing.shards import JOURNAL_FILE
from lightning_drm.checkpoints.writing.sidecars import companion_problems
from lightning_drm.storage import only_one


def _is_in(file: Path, folder: Path) -> bool:
    """Whether a file would go with a folder, which it may be: by its own path, or by that of what links lead to."""
    return file.absolute().is_relative_to(folder.absolute()) or file.resolve().is_relative_to(folder.resolve())


class OutputFolder:
    """Where a merge writes.

    Args:
        path: The folder that the user asked for.

    Attributes:
        path: The same.
        partial: The hidden folder beside it in which everything is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")

    def problems(self, plan: Plan, overwrite: bool) -> list[str]:
        """What keeps the output from being written.

        Args:
            plan: What will be written.
            overwrite: Whether an existing folder may be replaced.
        """
        path, problems = self.path, []
        if path.exists() and not (path.is_dir() and (overwrite or not any(path.iterdir()))):
            problems.append(f"{path} exists; choose another output, or set overwrite.")
        if plan.output_format == "full" and plan.base.folder is not None:
            problems += companion_problems(plan.base.folder)
        inputs = [plan.base.folder, *plan.base.tensors.files]
        inputs += [file for task in plan.tasks for file in (task.input.path, *task.input.files)]
        if lost := [given for given in inputs if given is not None and _is_in(given, path)]:
            is_input = any(given.resolve() == path.resolve() for given in lost)
            problems.append(f"{path} {'is one of the inputs' if is_input else f'holds an input, {lost[0]}'}.")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        knows = plan.output_format == "full" or not plan.problems  # factors that do not fit have no size
        free, needed = shutil.disk_usage(parent).free + self._held(), disk_bytes(plan) if knows else 0
        if needed > free:
            problems.append(f"{path} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left.")
        return problems

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from merging into the same folder."""
        return only_one(self.path, f"merging into {self.path}")

    def clear_leftovers(self) -> None:
        """Removes what an interrupted merge left, except what can be taken up: shards with their journal."""
        if self.partial.is_dir() and not (self.partial / JOURNAL_FILE).is_file():
            shutil.rmtree(self.partial)
        elif self.partial.is_dir():
            for folder in [entry for entry in self.partial.iterdir() if entry.is_dir()]:
                shutil.rmtree(folder)

    def publish(self) -> None:
        """Gives the finished folder its name; a folder that has this name is replaced."""
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.partial.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _held(self) -> int:
        """Bytes that an interrupted merge occupies; the next merge takes them up or writes over them."""
        try:
            return sum(file.stat().st_blocks * 512 for file in self.partial.rglob("*"))
        except FileNotFoundError:  # the merge was not interrupted, and has just ended
            return 0
