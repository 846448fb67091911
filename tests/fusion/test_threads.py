"""Several tensors at once, in threads that can sum up what they find."""

import threading
import time

import pytest
import torch

from lightning_drm.fusion import threads as module
from lightning_drm.fusion.threads import num_threads, side_by_side, summed_over_threads

CPU = torch.device("cpu")


def test_side_by_side_does_everything_in_threads_with_one_core():
    before, barrier = torch.get_num_threads(), threading.Barrier(2)

    def work(item):
        if item < 2:
            barrier.wait(timeout=60)  # two are at work at once
        return item, torch.get_num_threads()

    done = sorted(side_by_side(work, range(20), 2))
    assert done == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == before


def test_side_by_side_ends_with_the_first_error():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01)
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        list(side_by_side(work, range(1000), 2))
    assert len(begun) < 100


def test_threads_are_two_at_least_and_no_crowd(threads):
    assert num_threads(CPU) == {1: 2, 3: 3, 20: 8}[threads]
    assert num_threads(torch.device("cuda")) == 2


@pytest.fixture(params=[1, 3, 20])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_add_up_what_they_found(count):
    """Several times, and what one thread does to its sum is its own."""
    calls = []

    def reduce(tensor):
        calls.append(tensor.clone())
        return tensor * 10

    def work(own_items, add_up):
        first = add_up(torch.tensor([float(sum(own_items())), 1.0])).mul_(2)
        return first, add_up(torch.tensor([3.0 * len(list(own_items()))]))

    first, second = summed_over_threads(work, range(10), reduce, count)
    assert first.tolist() == [20.0 * 45, 20.0 * count]
    assert second.tolist() == [30.0 * 10]
    assert [call.tolist() for call in calls] == [[45.0, count], [30.0]]


def test_threads_end_with_the_one_that_failed():
    seen = []

    def work(own_items, add_up):
        for item in own_items():
            seen.append(item)
            time.sleep(0.01)
            if item == 1:
                raise ValueError("item 1")
        return add_up(torch.ones(1))

    with pytest.raises(ValueError, match="item 1"):
        summed_over_threads(work, range(1000), lambda tensor: tensor, 2)
    assert len(seen) < 20, "the other thread went on"


def test_threads_can_be_interrupted(monkeypatch):
    """While all threads are busy, and the main one waits for them."""
    seen = []

    def work(own_items, add_up):
        for item in own_items():
            seen.append(item)
            time.sleep(0.01)
        return add_up(torch.ones(1))

    def interrupt(futures):
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        summed_over_threads(work, range(1000), lambda tensor: tensor, 2)
    assert len(seen) < 100
