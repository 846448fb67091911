"""Finetune N tasks with Lightning, merge them into one multitask model with Decom-Renorm-Merge, and test it."""

from importlib.metadata import version

from lightning_drm.callback import DRMMergeCallback
from lightning_drm.data import MultiTaskDataModule
from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, LowRank, TaskArithmetic
from lightning_drm.modules import MultiTaskModule, TransformerTask
from lightning_drm.trainer import MergeTrainer

__version__ = version("lightning_drm")

__all__ = [
    "DARETIES",
    "DRM",
    "TIES",
    "TSVM",
    "Average",
    "DRMMergeCallback",
    "IsoC",
    "IsoCTS",
    "LowRank",
    "MergeTrainer",
    "MultiTaskDataModule",
    "MultiTaskModule",
    "TaskArithmetic",
    "TransformerTask",
]
