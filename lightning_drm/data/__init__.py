"""Tasks and their data: text and image tasks read with `datasets`, and several tasks as one data module."""

from lightning_drm.data.choice import MultipleChoiceTask
from lightning_drm.data.image import ImageTask
from lightning_drm.data.language import LanguageTask
from lightning_drm.data.multitask import MultiTaskDataModule
from lightning_drm.data.quickstart import QuickstartTask, QuickstartWordsTask
from lightning_drm.data.sample import SampledData, halves, has_rows, num_rows, require_validation_sets, some_rows
from lightning_drm.data.sequence import SequenceTask
from lightning_drm.data.text import TextTask
from lightning_drm.data.tokens import TokenTask

__all__ = [
    "ImageTask",
    "LanguageTask",
    "MultiTaskDataModule",
    "MultipleChoiceTask",
    "QuickstartTask",
    "QuickstartWordsTask",
    "SampledData",
    "SequenceTask",
    "TextTask",
    "TokenTask",
    "halves",
    "has_rows",
    "num_rows",
    "require_validation_sets",
    "some_rows",
]
