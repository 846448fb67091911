"""Methods whose expensive part serves many settings: a search over the others does it once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from typing_extensions import override

from lightning_drm.merging.linalg.selection import Reduce, identity
from lightning_drm.merging.low_rank import Delta
from lightning_drm.merging.method import Method


class PreparedMethod(Method):
    """A method that is `merge_prepared` of what `prepare` made, and whose `prepare` depends on few of its arguments."""

    @property
    @abstractmethod
    def preparation(self) -> tuple[object, ...]:
        """The arguments that `prepare` depends on."""

    @abstractmethod
    def prepare(self, deltas: Sequence[Delta]) -> Any:
        """Do the expensive part of `merge` once, for all settings of the same `preparation`.

        Args:
            deltas: As for `merge`.

        Returns:
            What `merge_prepared` takes: a tensor, or an object whose attributes are plain values, tensors and tuples
            of these.
        """

    @abstractmethod
    def merge_prepared(self, prepared: Any, coefficients: Sequence[float] | None = None) -> Delta:
        """Merge deltas that were prepared.

        Args:
            prepared: What `prepare` of a method with the same `preparation` returned; it stays as it is.
            coefficients: As for `merge`.

        Returns:
            The merged delta.
        """

    @override
    def calibrate(
        self,
        stream: Callable[[], Iterable[Sequence[Delta]]],
        *,
        reduce: Reduce = identity,
        num_tasks: int | None = None,
    ) -> Self:
        return self.calibrate_prepared(lambda: map(self.prepare, stream()), reduce=reduce, num_tasks=num_tasks)

    def calibrate_prepared(
        self, stream: Callable[[], Iterable[Any]], *, reduce: Reduce = identity, num_tasks: int | None = None
    ) -> Self:
        """Fix what depends on the whole model, from what `prepare` made of it; nothing, for most methods.

        Args:
            stream: Called once or more; yields what `prepare` made of one parameter after another.
            reduce: As for `calibrate`.
            num_tasks: As for `calibrate`.

        Returns:
            The method to merge with.
        """
        return self
