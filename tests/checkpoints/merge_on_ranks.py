"""What ranks do for test_several_processes: merges, one after the other, all together."""

from collections.abc import Sequence
from typing import Any

from lightning_drm import merge_checkpoints
from lightning_drm.distributed.launch import started_together


def merge_all(merges: Sequence[dict[str, Any]]) -> None:
    with started_together() as ranks:
        for arguments in merges:
            merge_checkpoints(**arguments, ranks=ranks)
