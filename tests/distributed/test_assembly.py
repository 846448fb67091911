"""Ranks wait minutes for each other to start, and then, at work, for as long as it takes."""

import re
from pathlib import Path

import pytest

from distributed.assembly_cases import AWAY, merge_late, never_meet, never_start
from helpers import models
from helpers.ranks import end_codes, start_ranks
from lightning_drm import Average, merge_checkpoints

pytestmark = pytest.mark.processes

PATIENCE = 60  # seconds for processes to end


def require_told(folder: Path, ranks: range) -> None:
    """Each of the ranks said what it missed, while the absent one was still there."""
    for rank in ranks:
        assert float((folder / f"{rank}.out").read_text()) < AWAY / 2
        lines = (folder / f"{rank}.err").read_text().splitlines()
        (said,) = (line for line in lines if line.startswith("lightning-drm: "))
        assert re.fullmatch(rf"lightning-drm: Rank {rank} of 3 did not find all others at 127\.0\.0\.1:\d+: .+", said)


def test_a_rank_that_never_starts_ends_the_others(tmp_path: Path):
    assert end_codes(start_ranks(never_start, 3, tmp_path), PATIENCE) == [2, 2, 0]
    require_told(tmp_path, range(2))


@pytest.mark.parametrize(("deed", "code"), [("stays away", 0), ("dies", -9)])
def test_a_rank_that_never_comes_to_the_meetings_ends_the_others(deed: str, code: int, tmp_path: Path):
    """Also where the store and the group of the training would wait for half an hour."""
    assert end_codes(start_ranks(never_meet, 3, tmp_path, deed), PATIENCE) == [2, 2, code]
    require_told(tmp_path, range(2))


def test_a_merge_waits_longer_than_the_assembly(tmp_path: Path):
    models.save_llamas(tmp_path)
    arguments = {"base": str(tmp_path / "base"), "models": {task: str(tmp_path / task) for task in "ab"}}
    merge_checkpoints(**arguments, output=str(tmp_path / "alone"), method=Average())
    ranks = start_ranks(merge_late, 2, tmp_path, {**arguments, "output": str(tmp_path / "late")})
    assert end_codes(ranks, PATIENCE) == [0, 0]
    assert (tmp_path / "1.out").read_text() == "merged\n", "the case shows nothing"
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("late", "alone"))
    assert ours == theirs
