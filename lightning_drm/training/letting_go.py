"""Models that are done leave memory soon: a Trainer and its module refer to each other, so the collector frees them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """While it lasts, the collector looks only at what came after its start, which takes it milliseconds.

    A process that has imported PyTorch and Transformers holds a million objects, which otherwise take it a third of a
    second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
