"""Decompositions that several merges share change nothing but the time; merges side by side read deltas once."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.devices import CPU
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Decompositions, Fusion, Override, Recipe, merge_side_by_side
from lightning_drm.merging import DRM, TIES, Delta, IsoC, LowRank, Method, TaskArithmetic

SETTINGS = [
    DRM(density=0.1),
    DRM(density=0.7, scale=1.3),
    DRM(renormalize=False),
    DRM(elect_sign=False, disjoint=False),
    DRM(prune="individual"),
]


class Counted(Mapping[str, Delta]):
    """Deltas that count how often each is read."""

    def __init__(self, deltas: dict[str, Delta]) -> None:
        self.deltas = deltas
        self.num_reads: Counter[str] = Counter()

    def __contains__(self, name: object) -> bool:
        return name in self.deltas

    def __getitem__(self, name: str) -> Delta:
        self.num_reads[name] += 1
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)


@pytest.fixture
def vectors() -> list[TaskVector]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = []
    for task in ("a", "b", "c"):
        deltas = {
            "dense": drawn(12, 9),
            "fused": drawn(12, 8),
            "adapted": LowRank(drawn(10, 2), drawn(2, 7)),
            "experts": drawn(3, 6, 5),
            "bias": drawn(9),
        }
        kinds = {"dense": "matrix", "fused": "matrix", "adapted": "matrix", "experts": "experts", "bias": "other"}
        made.append(TaskVector(task, Counted(deltas), kinds, {}, {}))
    return made


OVERRIDES = [Override("fused", split=3)]
NUM_MATRICES = 1 + 3 + 1 + 3


def merged(
    vectors: list[TaskVector],
    method: Method,
    kept: Decompositions | None,
    device: torch.device = CPU,
    **settings: object,
):
    recipe = Recipe(method, overrides=OVERRIDES, **settings)
    return dict(Fusion(recipe, vectors, device, decompositions=kept))


@pytest.mark.parametrize("max_bytes", [None, 0, 2000], ids=["in memory", "on disk", "both"])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_one_decomposition_of_each_matrix_serves_all_settings(vectors, direction, max_bytes, tmp_path: Path, device):
    with Decompositions(tmp_path, max_bytes) as kept:
        for method in SETTINGS:
            setting = type(method)(**{**method.hyperparameters(), "direction": direction})
            for coefficients in ({}, {"a": 0.5, "c": -2.0}):
                again = merged(vectors, setting, kept, device, coefficients=coefficients)
                alone = merged(vectors, setting, None, device, coefficients=coefficients)
                assert again.keys() == alone.keys()
                for name, delta in again.items():
                    torch.testing.assert_close(delta, alone[name], rtol=1e-12, atol=1e-12)
        assert kept.num_decomposed == NUM_MATRICES
        assert bool(list(tmp_path.rglob("*.pt"))) == (max_bytes is not None)
        merged(vectors, DRM(direction=direction, rank_drop=0.5), kept, device)
        assert kept.num_decomposed == 2 * NUM_MATRICES
    assert not list(tmp_path.iterdir())


def test_methods_that_prepare_nothing_merge_as_ever(vectors, device):
    with Decompositions() as kept:
        for method in (TIES(0.3), IsoC(), TaskArithmetic()):
            for name, delta in merged(vectors, method, kept, device).items():
                assert torch.equal(delta, merged(vectors, method, None, device)[name])
        assert kept.num_decomposed == 0


def test_merges_side_by_side_read_each_delta_once_and_are_those_of_each_alone(vectors, device):
    methods = [DRM(), TaskArithmetic(0.3), IsoC()]
    fusions = [Fusion(Recipe(method), vectors, device) for method in methods]
    for vector in vectors:
        vector.deltas.num_reads.clear()
    found = dict(merge_side_by_side(fusions))
    assert all(set(vector.deltas.num_reads.values()) == {1} for vector in vectors)
    for place, method in enumerate(methods):
        for name, delta in dict(Fusion(Recipe(method), vectors, device)).items():
            assert torch.equal(found[name][place], delta)


def test_what_leaves_the_range_is_refused_with_and_without_kept_decompositions(vectors):
    for vector in vectors:
        vector.deltas.deltas["dense"] = vector.deltas.deltas["dense"].float()
    with Decompositions() as kept:
        for decompositions in (None, kept, kept):
            with pytest.raises(ValueError, match="dense: DRM: the merged delta has entries beyond float32"):
                merged(vectors, DRM(scale=1e39), decompositions)
