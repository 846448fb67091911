"""Small tasks with real labels, read from pinned packages: nothing is downloaded, nothing bundled."""

from lightning_drm.data.quickstart.task import QuickstartTask, QuickstartWordsTask

__all__ = ["QuickstartTask", "QuickstartWordsTask"]
