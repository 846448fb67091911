from .data import MultiTaskDataModule
from .merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, LowRank, TaskArithmetic
from .modules import MultiTaskModule, TransformerTask
from .training.callback import DRMMergeCallback
from .training.session import MergeSession
from .training.trainer import MergeTrainer

__version__: str

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
    "MergeSession",
    "MergeTrainer",
    "MultiTaskDataModule",
    "MultiTaskModule",
    "TaskArithmetic",
    "TransformerTask",
]
