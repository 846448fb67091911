"""Models that are done leave memory: a Trainer and its module refer to each other, so only the collector frees them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def let_go() -> None:
    """Frees what nobody refers to but itself, such as a Trainer and its module, which would stay for a while."""
    gc.collect()


@contextmanager
def cheap_collections() -> Iterator[None]:
    """While it lasts, `let_go` looks only at what came after its start, which takes it milliseconds.

    A process that has imported PyTorch and Transformers holds a million objects, which otherwise take it a third of a
    second each time. Where something else has frozen objects, that stays as it is.
    """
    let_go()  # what is frozen as garbage would stay
    frozen_by_others = gc.get_freeze_count() > 0
    if not frozen_by_others:
        gc.freeze()
    try:
        yield
    finally:
        let_go()
        if not frozen_by_others:
            gc.unfreeze()
