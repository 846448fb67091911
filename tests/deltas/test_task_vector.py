"""Reading task vectors whose deltas are in files."""

from collections.abc import Iterator, Mapping

import pytest

from lightning_drm.deltas import TaskVector
from lightning_drm.merging import Delta


class Damaged(Mapping[str, Delta]):
    """Has a delta that cannot be read."""

    def __contains__(self, name: object) -> bool:
        return name == "weight"

    def __getitem__(self, name: str) -> Delta:
        raise KeyError("something inside")

    def __iter__(self) -> Iterator[str]:
        return iter(["weight"])

    def __len__(self) -> int:
        return 1


def test_a_delta_that_cannot_be_read_is_not_one_that_is_not_there():
    vector = TaskVector("a", Damaged(), {"weight": "matrix"}, {}, {})
    assert vector.read("bias") is None
    with pytest.raises(KeyError, match="something inside"):
        vector.read("weight")
