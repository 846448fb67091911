"""Files that are whole or not there, and locks between processes."""

from lightning_drm.storage.locks import only_one
from lightning_drm.storage.whole import write_json, write_tensors, write_text, written_whole

__all__ = ["only_one", "write_json", "write_tensors", "write_text", "written_whole"]
