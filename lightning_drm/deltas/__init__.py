"""What a delta is, taking it from a live module, and keeping it in memory or in safetensors."""

from lightning_drm.deltas.collect import Base, is_quantized_base
from lightning_drm.deltas.fingerprint import describe_difference, fingerprint, hash_tensor
from lightning_drm.deltas.hashed_file import load_tensors
from lightning_drm.deltas.kinds import Kind, embedding_layer, guess_kind, transposed_names
from lightning_drm.deltas.parameters import (
    Parameter,
    backbone_layers,
    backbone_parameters,
    head_state,
    quantized_layers,
)
from lightning_drm.deltas.statistics import (
    STATISTICS_FILE,
    Collected,
    TaskStatistics,
    load_statistics,
    save_statistics,
)
from lightning_drm.deltas.store import (
    DELTAS_FILE,
    HEAD_FILE,
    StoredDeltas,
    load_task_vector,
    save_task_vector,
)
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.deltas.wrappers import remove_wrappers

__all__ = [
    "DELTAS_FILE",
    "HEAD_FILE",
    "STATISTICS_FILE",
    "Base",
    "Collected",
    "Kind",
    "Parameter",
    "StoredDeltas",
    "TaskStatistics",
    "TaskVector",
    "backbone_layers",
    "backbone_parameters",
    "describe_difference",
    "embedding_layer",
    "fingerprint",
    "guess_kind",
    "hash_tensor",
    "head_state",
    "is_quantized_base",
    "load_statistics",
    "load_task_vector",
    "load_tensors",
    "quantized_layers",
    "remove_wrappers",
    "save_statistics",
    "save_task_vector",
    "transposed_names",
]
