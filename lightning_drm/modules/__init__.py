"""LightningModules: one task (full or LoRA), and the merged model of all tasks."""

from lightning_drm.modules.batch_norm import batch_norms, by_batch_statistics, of_all_tasks
from lightning_drm.modules.duplicate import duplicate, share_factories, with_buffers_of, without_weights
from lightning_drm.modules.measurement import OF_DATA, described, unmeasurable
from lightning_drm.modules.multitask import MultiTaskModule
from lightning_drm.modules.own_hooks import BATCH_HOOKS, has_hook, logs_of, run_step
from lightning_drm.modules.pooling import PooledClassifier
from lightning_drm.modules.protocol import can_classify, class_logits, classify, head_names_of
from lightning_drm.modules.sample_states import SampleStates
from lightning_drm.modules.sharding import data_parallel, is_sharded
from lightning_drm.modules.statistics import fisher_information, gram_matrices
from lightning_drm.modules.transformer import TransformerTask

__all__ = [
    "BATCH_HOOKS",
    "OF_DATA",
    "MultiTaskModule",
    "PooledClassifier",
    "SampleStates",
    "TransformerTask",
    "batch_norms",
    "by_batch_statistics",
    "can_classify",
    "class_logits",
    "classify",
    "data_parallel",
    "described",
    "duplicate",
    "fisher_information",
    "gram_matrices",
    "has_hook",
    "head_names_of",
    "is_sharded",
    "logs_of",
    "of_all_tasks",
    "run_step",
    "share_factories",
    "unmeasurable",
    "with_buffers_of",
    "without_weights",
]
