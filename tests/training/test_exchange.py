"""Merged weights of a fusion whose largest parameters are merged a few rows at a time, as on a GPU."""

import pytest
import torch
from torch import Tensor

from lightning_drm.deltas import TaskVector
from lightning_drm.distributed.ranks import ALONE
from lightning_drm.fusion import Fusion, Recipe, pieces, too_large_as_a_whole
from lightning_drm.merging import DRM, TIES, LiNeS, Method
from lightning_drm.training.exchange import merge_together

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def weights(fusion: Fusion, base: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(merge_together(fusion, base, dict.fromkeys(base, 0), ALONE, CPU))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [DRM(density=0.4), TIES(0.4), LiNeS(DRM(density=0.4), 0.5, 0.5)], ids=repr)
def test_rows_at_a_time_give_the_weights_of_whole_parameters(
    vectors: list[TaskVector],
    dense: dict[str, list[Tensor]],
    method: Method,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
):
    if isinstance(method, LiNeS):
        vectors = [renamed(vector) for vector in vectors]
        dense = {f"layer.{number % 2}.{name}": deltas for number, (name, deltas) in enumerate(dense.items())}
    shapes = {name: tuple(deltas[0].shape) for name, deltas in dense.items()}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    expected = weights(Fusion(Recipe(method), vectors, device, shapes=shapes), base)
    for size in ("PIECE", "DEVICE_PIECE"):
        monkeypatch.setattr(pieces, size, 8)
    whole = Fusion(Recipe(method), vectors, device, shapes=shapes)
    names = {name for name, treatment in whole.treatments.items() if treatment.works_in_pieces}
    fusion = Fusion(Recipe(method), vectors, device, shapes=shapes, in_pieces=names)
    assert sum(fusion.comes_in_pieces(name) for name in base) >= 5
    found = weights(fusion, base)
    assert list(found) == list(expected)
    for name, weight in found.items():
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(torch.equal(found[name], base[name]) for name in base)


def renamed(vector: TaskVector) -> TaskVector:
    """With names that say a depth."""
    order = ["dense.weight", "adapted.weight", "embed.weight", "conv.weight", "dense.bias", "token", "scale"]
    names = {name: f"layer.{number % 2}.{name}" for number, name in enumerate(order)}
    return TaskVector(
        vector.task,
        {names[name]: delta for name, delta in vector.deltas.items()},
        {names[name]: kind for name, kind in vector.kinds.items()},
        vector.head,
        {},
    )


def test_an_embedding_of_a_large_model_is_too_large_on_a_gpu_alone():
    kinds = {"embed": "embedding", "gate": "matrix", "norm": "other"}
    shapes = {"embed": (128256, 4096), "gate": (14336, 4096), "norm": (4096,)}
    for method, expected in ((DRM(), {"embed"}), (TIES(), {"embed", "gate"})):
        treatments = {name: Recipe(method).treatment(name, kind, ["a", "b"]) for name, kind in kinds.items()}
        assert too_large_as_a_whole(treatments, shapes, CUDA) == expected
        assert too_large_as_a_whole(treatments, shapes, CPU) == frozenset()
