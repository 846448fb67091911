"""The memory that a merge is expected to take, counted by hand."""

import pytest
import torch

from lightning_drm import RegMean
from lightning_drm.fusion import Recipe, merging_bytes, pieces
from lightning_drm.fusion.threads import num_threads

CPU = torch.device("cpu")


def test_a_piece_of_experts_takes_the_gram_matrices_of_its_own_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "PIECE", 2 * 6 * 4)
    treatments = {"experts": Recipe(RegMean()).treatment("experts", "experts", ["a", "b", "c"])}
    found = merging_bytes(treatments, {"experts": (8, 6, 4)}, 3, CPU, in_pieces={"experts"})
    deltas, copies, grams = 2 * 24 * (3 + 4), 2 * 3 * 24, 3 * 2 * 6**2
    assert found == 4 * (deltas + copies + grams) * num_threads(CPU)


def test_a_matrix_takes_one_gram_matrix_for_each_task():
    treatments = {"fc.weight": Recipe(RegMean()).treatment("fc.weight", "matrix", ["a", "b"])}
    with_grams = merging_bytes(treatments, {"fc.weight": (1000, 10)}, 2, CPU)
    read, copies, grams = 2 * 2 * 10_000, (2 + 4) * 10_000, 2 * 10**2
    assert with_grams == 4 * (read + copies + grams)
