"""What tests of merging files in other processes share."""

from collections.abc import Iterator

import pytest
import torch

collect_ignore = ["litgpt/make.py"]  # a script that needs litgpt


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Rounding depends on the number of threads, and a started process has one, a forked one none of its parent's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
