"""RegMean++ (arXiv 2508.03121): statistics from inputs that come through the merged blocks before.

A merged layer does not get the inputs that its own task's model would give it, but those of the merged layers below:

1. What comes before the blocks, such as embeddings, is merged.
2. Each task runs its own block on the stack of the merged ones, with its own training data; Gram matrices are of these
   inputs. Inside a block, inputs are the task's own.
3. The block is merged, and every task goes on with the merged one; so does step 2 for the next block.

So it is the merge by these Gram matrices in place of those of the finetunes. What differs from the paper: all that is
in a block is merged by the whole recipe, biases and norms included, before the next one.

Cost: N forward passes of the samples for each block, and N models on the device at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_drm.deltas import Collected, TaskStatistics, TaskVector, backbone_parameters
from lightning_drm.fusion import Recipe
from lightning_drm.fusion.stages import stages
from lightning_drm.modules import head_names_of
from lightning_drm.training.session import MergeSession
from lightning_drm.training.statistics import taken


def propagated(
    session: MergeSession,
    recipe: Recipe,
    module: nn.Module,
    finetuned: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Any]],
    how: Collected,
) -> dict[str, TaskVector]:
    """Task vectors with the statistics of inputs that come through merged blocks. All ranks call it together.

    Args:
        session: What was collected.
        recipe: How to merge.
        module: An untrained module of the session's base, on the device.
        finetuned: By task, its finetuned module, whole and without adapters, on that device; it is changed.
        batches: By task, this rank's batches of its training data, on that device.
        how: How they were chosen, and whether padding counts.

    Returns:
        By task, its vector with these statistics, for `MergeSession.fuse`.
    """
    vectors, base = session.task_vectors, session.base_weights(module)
    heads = {task: head_names_of(one, session.head) for task, one in finetuned.items()}
    tensors = {
        task: {name: parameter.tensor for name, parameter in backbone_parameters(one, heads[task]).items()}
        for task, one in finetuned.items()
    }
    found = {task: TaskStatistics({}, {"gram": {}}, {"gram": replace(how, propagated=True)}) for task in vectors}
    merged = {name for vector in vectors.values() for name in vector.deltas}
    for stage in stages(name for name in next(iter(tensors.values())) if name in merged):
        for task, vector in vectors.items():
            names = set(stage) & vector.deltas.keys()
            own = taken("gram", finetuned[task], heads[task], names, batches[task], how, session.ranks)
            found[task] = found[task].with_more(own, "gram")
        of_stage = {task: replace(vectors[task].of(stage), statistics=found[task]) for task in vectors}
        with torch.no_grad():
            for name, (delta,) in session.merge_side_by_side([recipe], module, vectors=[of_stage]):
                for live in tensors.values():
                    live[name].copy_(base[name].to(delta) + delta)
    return {task: replace(vector, statistics=found[task]) for task, vector in vectors.items()}
