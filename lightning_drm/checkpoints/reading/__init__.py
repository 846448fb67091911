"""What a merge can start from: model folders, adapters, checkpoints and stored deltas, read one tensor at a time."""

from lightning_drm.checkpoints.reading.inert_pickle import note_on_ignored
from lightning_drm.checkpoints.reading.readers import BaseModel, open_base, open_input
from lightning_drm.checkpoints.reading.task_input import Entry, TaskInput
from lightning_drm.checkpoints.reading.tensors import TensorHeader, Tensors, quick_fingerprint

__all__ = [
    "BaseModel",
    "Entry",
    "TaskInput",
    "TensorHeader",
    "Tensors",
    "note_on_ignored",
    "open_base",
    "open_input",
    "quick_fingerprint",
]
