"""The merging methods: pure functions of tensors, without files, models or names of parameters."""

from lightning_drm.merging.dare import DARETIES
from lightning_drm.merging.drm import DRM
from lightning_drm.merging.iso import IsoC, IsoCTS
from lightning_drm.merging.joint_basis import JointBasis
from lightning_drm.merging.linear import Average, TaskArithmetic
from lightning_drm.merging.low_rank import Delta, LowRank, LowRankStack
from lightning_drm.merging.method import Method
from lightning_drm.merging.prepared import PreparedMethod
from lightning_drm.merging.ties import TIES
from lightning_drm.merging.tsvm import TSVM

METHODS: tuple[type[Method], ...] = (DRM, TIES, DARETIES, TaskArithmetic, Average, IsoC, IsoCTS, TSVM)
"""All methods of this package, each of which has defaults."""

__all__ = [
    "DARETIES",
    "DRM",
    "METHODS",
    "TIES",
    "TSVM",
    "Average",
    "Delta",
    "IsoC",
    "IsoCTS",
    "JointBasis",
    "LowRank",
    "LowRankStack",
    "Method",
    "PreparedMethod",
    "TaskArithmetic",
]
