"""Loading one task of a merged model, for predictions: from the folder that a run or a hub has, without the run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_drm.checkpoints.reading.locate import locate
from lightning_drm.deltas.adapters import read_factors
from lightning_drm.deltas.hashed_file import HashedFile
from lightning_drm.modules import MultiTaskModule, TransformerTask, duplicate, head_names_of
from lightning_drm.storage.json_files import read_object
from lightning_drm.training.merged_folder import DESCRIPTION, read_merged, read_statistics
from lightning_drm.training.run_folder import BATCH_NORM, RECORD_FILE


def load_merged(folder: str | os.PathLike[str], task: str, module: nn.Module | None = None) -> nn.Module:
    """Loads a task's module with the merged backbone and the task's head, for predictions.

    Args:
        folder: The ``merged`` folder of a run, or a hub name, ``org/name`` or ``org/name@revision``.
        task: The task's name.
        module: A module of the task's own class, which stays as it is. A `TransformerTask` needs none.

    Returns:
        The module in evaluation mode, on the CPU or on the given module's device.

    Raises:
        FileNotFoundError: If the folder holds no merged model of this task.
        ValueError: If the model cannot be found, is damaged, or needs a `module`.

    Example::

        model = load_merged("runs/quickstart/merged", "news_topic")
        tokenizer = AutoTokenizer.from_pretrained("runs/quickstart/merged")
        model(**tokenizer(["Shares fell after the report."], return_tensors="pt")).argmax(-1)
    """
    path = locate(os.fspath(folder))
    own = duplicate(module) if module is not None else _described(path, task)
    heads = read_merged(path, own, head_names_of(own), [task])
    factors = read_factors(path, own, head_names_of(own))
    record: Mapping[str, Any] = read_object(path / RECORD_FILE) if (path / RECORD_FILE).is_file() else {}
    statistics = read_statistics(path, record.get(BATCH_NORM))
    chosen = {task: statistics[task]} if task in statistics else None
    loaded = MultiTaskModule.assemble({task: own}, None, heads, statistics=chosen, factors=factors)
    return loaded.task_module(task).eval()


def _described(path: Path, task: str) -> nn.Module:
    """The module that the head's file describes, with any weights."""
    file = path / "heads" / f"{task}.safetensors"
    if not file.is_file():
        heads = ", ".join(sorted(one.stem for one in (path / "heads").glob("*.safetensors")))
        raise FileNotFoundError(f"{path} holds no merged model of task {task!r}; it has {heads or 'no heads at all'}.")
    found = HashedFile(file, "a head", "merge again")
    if DESCRIPTION not in found.metadata:
        raise ValueError(
            f"{path} does not say how the module of task {task!r} is made: give load_merged one, as in "
            f"load_merged(folder, {task!r}, MyModule())."
        )
    description = found.described(DESCRIPTION)
    try:
        return TransformerTask.from_description(str(path), description)
    except OSError as error:
        if "base" not in description:
            raise
        raise ValueError(
            f"{path} is an adapter on {description['base']['backbone']!r}, which is not at hand under this name: give "
            f"load_merged a module on that base, as in load_merged(folder, {task!r}, TransformerTask(…))."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {json.dumps(description)} describes no module ({error}).") from error
