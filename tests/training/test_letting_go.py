"""What is let go of, and when: garbage of before, of a run, and what somebody else has frozen."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from lightning_drm.training.letting_go import cheap_collections, let_go


class Knot:
    """Refers to itself, as a Trainer and its module do."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    gc.unfreeze()  # what conftest.py has frozen
    gc.disable()  # it would come in between
    yield
    gc.enable()
    gc.unfreeze()


def test_what_was_garbage_before_is_gone_when_it_starts():
    gone = weakref.ref(Knot())
    assert gone() is not None, "the case shows nothing"
    with cheap_collections():
        assert gone() is None


def test_what_comes_after_its_start_is_let_go_and_all_before_is_looked_at_again_later():
    before = Knot()
    with cheap_collections():
        assert gc.get_freeze_count() > 1000
        new = weakref.ref(Knot())
        let_go()
        assert new() is None
        at_the_end = weakref.ref(Knot())
        old = weakref.ref(before)
        del before
    assert gc.get_freeze_count() == 0
    assert at_the_end() is None
    let_go()
    assert old() is None


def test_what_others_have_frozen_stays_frozen():
    theirs = Knot()
    gc.freeze()
    with cheap_collections():
        new = weakref.ref(Knot())
        let_go()
        assert new() is None
    frozen = weakref.ref(theirs)
    del theirs
    let_go()
    assert frozen() is not None
