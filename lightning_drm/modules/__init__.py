"""LightningModules: one task (full or LoRA), and the merged model of all tasks."""

from lightning_drm.modules.batch_norm import batch_norms, of_all_tasks
from lightning_drm.modules.duplicate import duplicate, share_factories, with_buffers_of, without_weights
from lightning_drm.modules.measurement import OF_DATA, described, unmeasurable
from lightning_drm.modules.multitask import MultiTaskModule
from lightning_drm.modules.own_hooks import BATCH_HOOKS, has_hook
from lightning_drm.modules.pooling import PooledClassifier
from lightning_drm.modules.protocol import can_classify, classify, head_names_of
from lightning_drm.modules.sample_states import SampleStates
from lightning_drm.modules.sharding import data_parallel, is_sharded
from lightning_drm.modules.transformer import TransformerTask

__all__ = [
    "BATCH_HOOKS",
    "OF_DATA",
    "MultiTaskModule",
    "PooledClassifier",
    "SampleStates",
    "TransformerTask",
    "batch_norms",
    "can_classify",
    "classify",
    "data_parallel",
    "described",
    "duplicate",
    "has_hook",
    "head_names_of",
    "is_sharded",
    "of_all_tasks",
    "share_factories",
    "unmeasurable",
    "with_buffers_of",
    "without_weights",
]
