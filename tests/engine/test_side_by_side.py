"""Parameters merged two at a time: same bits, same order, no more memory, and the threads' settings left alone."""

import threading
import time

import pytest
import torch

from lightning_drm.deltas import TaskVector
from lightning_drm.engine import Fusion, Recipe, side_by_side
from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, LowRank, Method, TaskArithmetic

METHODS: list[Method] = [DRM(), DRM("vertical"), TIES(), DARETIES(), TaskArithmetic(), IsoC(), IsoCTS(), TSVM()]


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def vectors():
    """Matrices of several sizes, a low-rank one, and vectors, so that the two threads overtake each other."""
    g = torch.Generator().manual_seed(0)

    def deltas():
        drawn = {f"{i}.weight": torch.randn(40 + 90 * (i % 3), 160 - 30 * (i % 4), generator=g) for i in range(12)}
        factors = LowRank(torch.randn(50, 3, generator=g), torch.randn(3, 60, generator=g))
        return {**drawn, "adapted.weight": factors, "bias": torch.randn(9, generator=g)}

    kinds = {**{f"{i}.weight": "matrix" for i in range(12)}, "adapted.weight": "matrix", "bias": "other"}
    return [TaskVector(task, deltas(), kinds, {}, {}) for task in ("one", "two", "three")]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_same_bits_with_and_without(vectors, threads, method):
    """Each of two gets half of the threads: with two or three that is one, as in a merge one after the other."""
    threads(1)
    alone = dict(Fusion(Recipe(method), vectors))
    for number in (2, 3):
        threads(number)
        merged = dict(Fusion(Recipe(method), vectors))
        assert list(merged) == list(alone)
        assert all(torch.equal(merged[name], delta) for name, delta in alone.items())


def test_same_bits_whatever_the_timing(vectors, threads, monkeypatch):
    """Some get all threads and some one, as their cost says; who is beside them does not matter."""
    monkeypatch.setattr(side_by_side, "LARGE", 1e7)
    threads(4)
    fusion = Fusion(Recipe(DRM()), vectors)
    first = dict(fusion)
    merge, delays = Fusion._merge, iter([0.0, 0.05, 0.02] * 100)

    def slow(*arguments):
        time.sleep(next(delays))
        return merge(*arguments)

    monkeypatch.setattr(Fusion, "_merge", slow)
    assert all(torch.equal(delta, first[name]) for name, delta in fusion)


def test_an_error_comes_in_its_turn(vectors, threads):
    threads(2)
    vectors[1].deltas["2.weight"][0, 0] = torch.nan
    merged = iter(Fusion(Recipe(DRM()), vectors))
    assert [next(merged)[0] for _ in range(2)] == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        next(merged)


def test_never_more_than_two_at_once(threads):
    threads(2)
    lock, alive, seen = threading.Lock(), set(), []

    def work(item, cores):
        with lock:
            alive.add(item)
            seen.append(len(alive))
        time.sleep(0.002)
        return item

    for item in side_by_side.side_by_side(work, range(20)):
        time.sleep(0.001 * (item % 3))
        with lock:
            alive.remove(item)
    assert len(seen) == 20
    assert max(seen) == 2


def test_small_work_gets_half_of_the_cores_and_large_work_all(threads):
    threads(4)
    lock, running, seen = threading.Lock(), [], []

    def work(cost, cores):
        with cores.for_work_of(cost):
            with lock:
                running.append(cost)
            time.sleep(0.01)
            with lock:
                seen.append((cost, torch.get_num_threads(), len(running)))
                running.remove(cost)

    small, large = 1.0, 2 * side_by_side.LARGE
    list(side_by_side.side_by_side(work, [small, small, large, small, large, large, small, small]))
    assert {(cost, number) for cost, number, _ in seen} == {(small, 2), (large, 4)}
    assert {beside for cost, _, beside in seen if cost == large} == {1}
    assert 2 in {beside for cost, _, beside in seen if cost == small}


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_settings_and_threads_are_left_as_they_were(vectors, threads, num_taken):
    """Also when the caller stops half-way: nothing runs on, and later threads get what they would have got."""
    threads(3)
    before, asked = threading.active_count(), []
    merged = iter(Fusion(Recipe(Average()), vectors))
    for _ in range(num_taken):
        next(merged)
    assert torch.get_num_threads() == 3
    merged.close()
    later = threading.Thread(target=lambda: asked.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert asked == [3]
    assert threading.active_count() == before
