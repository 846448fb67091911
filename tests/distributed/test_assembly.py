"""Ranks wait minutes for each other to start, and then, at work, for as long as it takes."""

import re
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from distributed.assembly_cases import PATIENCE, merge_late, never_meet, never_start
from helpers import models
from helpers.ranks import end_codes, start_ranks
from lightning_drm import Average, merge_checkpoints

pytestmark = pytest.mark.processes

MINUTE = 60  # for processes to end


def require_told(ranks: list[ForkServerProcess], folder: Path, absent: int | None) -> None:
    """All but the last rank end soon, and say what they missed. The last one has an exit code by then, or is there."""
    assert end_codes(ranks[:2], MINUTE) == [2, 2]
    assert ranks[2].exitcode == absent
    ranks[2].kill()
    for rank in range(2):
        assert float((folder / f"{rank}.out").read_text()) < 2 * PATIENCE
        lines = (folder / f"{rank}.err").read_text().splitlines()
        (said,) = (line for line in lines if line.startswith("lightning-drm: "))
        assert re.fullmatch(rf"lightning-drm: Rank {rank} of 3 did not find all others at 127\.0\.0\.1:\d+: .+", said)


def test_a_rank_that_never_starts_ends_the_others(tmp_path: Path):
    require_told(start_ranks(never_start, 3, tmp_path), tmp_path, None)


@pytest.mark.parametrize(("deed", "code"), [("stays away", None), ("dies", -9)])
def test_a_rank_that_never_comes_to_the_meetings_ends_the_others(deed: str, code: int | None, tmp_path: Path):
    """Also where the store and the group of the training would wait for half an hour."""
    require_told(start_ranks(never_meet, 3, tmp_path, deed), tmp_path, code)


def test_a_merge_waits_longer_than_the_assembly(tmp_path: Path):
    models.save_llamas(tmp_path)
    arguments = {"base": str(tmp_path / "base"), "models": {task: str(tmp_path / task) for task in "ab"}}
    merge_checkpoints(**arguments, output=str(tmp_path / "alone"), method=Average())
    ranks = start_ranks(merge_late, 2, tmp_path, {**arguments, "output": str(tmp_path / "late")})
    assert end_codes(ranks, MINUTE) == [0, 0]
    assert (tmp_path / "1.out").read_text() == "merged\n", "the case shows nothing"
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("late", "alone"))
    assert ours == theirs
