"""How what several processes left is compared with what one process makes of the same."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from lightning_drm import Average
from lightning_drm.deltas import load_task_vector
from lightning_drm.fusion import Fusion, Recipe


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def require_average_of_stored(run: Path, base: Path, tasks: Sequence[str]) -> None:
    """The merged weights of a run folder are, to the bit, the base and the average of the deltas that it has."""
    vectors = [load_task_vector(run / "tasks" / task) for task in tasks]
    before = dict(AutoModel.from_pretrained(base).named_parameters())
    merged = load_file(run / "merged/model.safetensors")
    expected = {name.removeprefix("model.encoder."): delta for name, delta in Fusion(Recipe(Average()), vectors)}
    assert expected.keys() <= merged.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, before[name] + expected[name] if name in expected else before[name]), name
