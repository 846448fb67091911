"""Ranks that watch each other: which end ends the others, what is said of it and by whom, and what is no end at all."""

import re
from pathlib import Path

import pytest

from distributed.watch_cases import work_again, work_together
from helpers.ranks import end_codes, start_ranks
from lightning_drm.distributed import watch

pytestmark = pytest.mark.processes

PATIENCE = 60  # seconds: all ranks have ended within a minute


def said(folder: Path, size: int) -> list[str]:
    """What the ranks said; rank 1 said the second entry."""
    texts = [(folder / f"{rank}.err").read_text() for rank in range(size)]
    assert not any("Traceback" in text for text in texts), texts
    return [text.removeprefix("lightning-drm: ").strip() for text in texts]


DEATHS = [
    (["dies", "meets"], 1),
    (["meets", "dies"], 0),
    (["dies", "sleeps", "computes"], 1),
    (["sleeps", "computes", "dies"], 0),
    (["computes", "dies", "meets"], 0),
    (["dies", "computes"], 1),
    (["sleeps", "is done", "dies"], 0),
    (["holds the lock", "meets", "dies"], 0),
]


@pytest.mark.parametrize(("deeds", "speaker"), DEATHS)
def test_a_rank_that_dies_ends_the_others_and_one_of_them_names_it(deeds: list[str], speaker: int, tmp_path: Path):
    ranks = start_ranks(work_together, len(deeds), tmp_path, deeds, "one")
    assert end_codes(ranks, PATIENCE) == [-9 if deed == "dies" else 2 for deed in deeds]
    victim = deeds.index("dies")
    sentence = (
        rf"Rank {victim} \(process {ranks[victim].pid} on .+\) died without an error message, so the other ranks ended "
        r"too\. Try again\."
    )
    words = said(tmp_path, len(deeds))
    assert re.fullmatch(sentence, words.pop(speaker))
    assert not any(words)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_ends_that_are_found_at_once_a_death_counts(order: tuple[int, int]):
    """Rank 2 died, and the meeting of rank 1 broke by it; a rank that is done ends nothing."""
    words = {1: watch._End(1, died=False), 2: None}
    heard = {0: watch._DONE, **{rank: words[rank] for rank in order}}
    assert watch._end_of(heard) == watch._End(2, died=True)
    assert watch._end_of({0: watch._DONE, 1: words[1]}) == words[1]
    assert watch._end_of({0: watch._DONE}) is None


@pytest.mark.parametrize("deeds", [["fails", "computes", "meets"], ["meets", "sleeps", "fails"], ["fails"] * 3])
def test_an_error_ends_all_and_is_said_once(deeds: list[str], tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, deeds, "one")
    assert end_codes(ranks, PATIENCE) == [2, 2, 2]
    (sentence,) = filter(None, said(tmp_path, 3))
    assert re.fullmatch(r"NaN on rank \d\.", sentence)


def test_each_rank_says_why_where_nobody_speaks_for_all(tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, ["meets", "computes", "fails"], "each")
    assert end_codes(ranks, PATIENCE) == [2, 2, 2]
    first, second, failed = said(tmp_path, 3)
    assert re.fullmatch(rf"Rank 2 \(process {ranks[2].pid} on .+\) failed, so the other ranks ended too\.", first)
    assert second == first
    assert failed == "NaN on rank 2."


def test_ranks_that_are_stopped_together_each_end_by_themselves(tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, ["is stopped"] * 3, "each")
    assert end_codes(ranks, PATIENCE) == [143] * 3
    assert said(tmp_path, 3) == ["", "", ""]


def test_a_rank_that_is_stopped_alone_ends_the_others(tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, ["meets", "is stopped", "sleeps"], "each")
    assert end_codes(ranks, PATIENCE) == [2, 143, 130]
    sentence = rf"Rank 1 \(process {ranks[1].pid} on .+\) was stopped, so the other ranks ended too\."
    words = said(tmp_path, 3)
    assert re.fullmatch(sentence, words[0])
    assert not any(words[1:])


def test_a_launcher_that_reports_a_death_speaks_alone(tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, ["meets", "dies", "computes"], "launcher")
    assert end_codes(ranks, PATIENCE) == [2, -9, 2]
    assert said(tmp_path, 3) == ["", "", ""]


@pytest.mark.parametrize("deeds", [["holds the lock", "meets", "meets"], ["meets", "meets", "holds the lock"]])
def test_a_rank_that_holds_the_lock_of_its_interpreter_is_not_dead(deeds: list[str], tmp_path: Path):
    ranks = start_ranks(work_together, 3, tmp_path, deeds, "one")
    assert end_codes(ranks, PATIENCE) == [0, 0, 0]
    assert said(tmp_path, 3) == ["", "", ""]


def test_ranks_that_caught_their_errors_can_work_together_again(tmp_path: Path):
    ranks = start_ranks(work_again, 2, tmp_path)
    assert end_codes(ranks, PATIENCE) == [0, 0]
    first, second = ((tmp_path / f"{rank}.out").read_text() for rank in range(2))
    assert re.fullmatch(r"ValueError: Rank 1 \(process .+\) failed, so the other ranks ended too\.\ndone\n", first)
    assert second == "KeyError: 'mine'\ndone\n"
