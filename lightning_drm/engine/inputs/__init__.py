"""What a merge can start from: model folders, adapters, checkpoints and stored deltas, read one tensor at a time."""

from lightning_drm.engine.inputs.architecture import Architecture
from lightning_drm.engine.inputs.locate import BaseModel, open_base, open_input
from lightning_drm.engine.inputs.source import Entry, TaskInput
from lightning_drm.engine.inputs.tensors import TensorHeader, Tensors, quick_fingerprint

__all__ = [
    "Architecture",
    "BaseModel",
    "Entry",
    "TaskInput",
    "TensorHeader",
    "Tensors",
    "open_base",
    "open_input",
    "quick_fingerprint",
]
