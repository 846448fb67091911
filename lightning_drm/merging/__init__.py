"""The merging methods: pure functions of tensors, without files, models or names of parameters."""

from lightning_drm.merging.dare import DARETIES
from lightning_drm.merging.dc_merge import DCMerge
from lightning_drm.merging.drm import DRM
from lightning_drm.merging.fisher import Fisher
from lightning_drm.merging.iso import IsoC, IsoCTS
from lightning_drm.merging.joint_basis import JointBasis
from lightning_drm.merging.knots import KnOTS
from lightning_drm.merging.linear import Average, TaskArithmetic
from lightning_drm.merging.lines import LiNeS
from lightning_drm.merging.low_rank import Delta, LowRank, LowRankStack
from lightning_drm.merging.method import Method
from lightning_drm.merging.prepared import PreparedMethod
from lightning_drm.merging.regmean import RegMean
from lightning_drm.merging.star import STAR
from lightning_drm.merging.statistics import Need, Statistics
from lightning_drm.merging.svc import SVC
from lightning_drm.merging.ties import TIES
from lightning_drm.merging.tsvm import TSVM
from lightning_drm.merging.wudi import WUDI

METHODS: tuple[type[Method], ...] = (
    DRM, TIES, DARETIES, TaskArithmetic, Average, IsoC, IsoCTS, TSVM, WUDI, DCMerge, STAR, KnOTS, RegMean, Fisher,
)  # fmt: skip
"""All methods of this package that have defaults; `SVC` and `LiNeS` change what another one merges."""

__all__ = [
    "DARETIES",
    "DRM",
    "METHODS",
    "STAR",
    "SVC",
    "TIES",
    "TSVM",
    "WUDI",
    "Average",
    "DCMerge",
    "Delta",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "JointBasis",
    "KnOTS",
    "LiNeS",
    "LowRank",
    "LowRankStack",
    "Method",
    "Need",
    "PreparedMethod",
    "RegMean",
    "Statistics",
    "TaskArithmetic",
]
