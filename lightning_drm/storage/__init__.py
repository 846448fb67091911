"""Files that are whole or not there, what keeps them from being written, and locks between processes."""

from lightning_drm.storage.faults import WriteError, fault_behind, writing
from lightning_drm.storage.locks import only_one
from lightning_drm.storage.whole import write_json, write_tensors, write_text, written_whole

__all__ = [
    "WriteError",
    "fault_behind",
    "only_one",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
    "written_whole",
]
