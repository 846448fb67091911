"""A task vector: all deltas of one task, its head, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_drm.deltas.parameters import Kind
from lightning_drm.merging import Delta


@dataclass(frozen=True)
class TaskVector:
    """What one finetune added to the base.

    Attributes:
        task: The task's name.
        deltas: Delta by parameter name; dense ones in float32 (or float64), LoRA ones as `LowRank`. A parameter that
            the task did not train is absent. The mapping may read from disk, one delta at a time.
        kinds: What each parameter in ``deltas`` is to its layer.
        head: The head's tensors by name.
        base_hashes: Hash by name of every backbone parameter that the task started from.
        settings: Hyper-parameters of the finetune, as they should be shown and compared.
    """

    task: str
    deltas: Mapping[str, Delta]
    kinds: Mapping[str, Kind]
    head: Mapping[str, Tensor]
    base_hashes: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)
