"""What tests of analyses read of a run that was analyzed."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from helpers.run import Run
from lightning_drm.deltas import TaskVector, load_task_vector

TASKS = ["color", "pet"]  # as deltas are ordered, by name


def table(run: Run, name: str) -> pd.DataFrame:
    """The table of a finding."""
    return pd.read_csv(run.folder / "analysis" / f"{name}.csv")


def stored(run: Run) -> list[TaskVector]:
    """The tasks' vectors, as they are stored."""
    return [load_task_vector(run.folder / "tasks" / task) for task in TASKS]


def deltas(run: Run, kind: str | None = None) -> dict[str, list[NDArray[np.float64]]]:
    """By name, the tasks' dense deltas of every parameter, or of those of a kind."""
    vectors = stored(run)
    return {
        name: [vector.deltas[name].double().numpy() for vector in vectors]
        for name, found in vectors[0].kinds.items()
        if kind is None or found == kind
    }
