from .checkpoints.merge import merge_checkpoints
from .data import MultiTaskDataModule
from .merging import (
    DARETIES,
    DRM,
    STAR,
    SVC,
    TIES,
    TSVM,
    WUDI,
    Average,
    DCMerge,
    Fisher,
    IsoC,
    IsoCTS,
    KnOTS,
    LiNeS,
    LowRank,
    RegMean,
    Statistics,
    TaskArithmetic,
)
from .modules import MultiTaskModule, TransformerTask
from .training.callback import DRMMergeCallback
from .training.loading import load_merged
from .training.session import MergeSession
from .training.trainer import MergeTrainer

__version__: str

__all__ = [
    "DARETIES",
    "DRM",
    "STAR",
    "SVC",
    "TIES",
    "TSVM",
    "WUDI",
    "Average",
    "DCMerge",
    "DRMMergeCallback",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "KnOTS",
    "LiNeS",
    "LowRank",
    "MergeSession",
    "MergeTrainer",
    "MultiTaskDataModule",
    "MultiTaskModule",
    "RegMean",
    "Statistics",
    "TaskArithmetic",
    "TransformerTask",
    "load_merged",
    "merge_checkpoints",
]
