"""Decompositions that several merges of the same task vectors share: kept in memory while there is room, then on disk.

The expensive part of a method may not depend on all of its parameters. DRM's joint basis depends on neither density,
coefficients nor switches, so a search over these decomposes every matrix once (`PreparedMethod.prepare`), and each
setting costs `PreparedMethod.merge_prepared`. KnOTS takes its thresholds from the same bases.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lightning_drm.fusion.device_memory import free_bytes
from lightning_drm.fusion.parameter import Merge
from lightning_drm.merging import Delta, Method, PreparedMethod
from lightning_drm.merging.inputs import check_result
from lightning_drm.merging.low_rank import densify

_MEMORY = 0.5  # of what is free: models, deltas and activations need the rest


class Decompositions:
    """What `PreparedMethod.prepare` made of the matrices of some task vectors.

    All merges that use one of these must be of the same task vectors. It is a context manager: its files go when it is
    left.

    Args:
        folder: Where files are put, in a folder of their own; the system's place for such files if left out.
        max_bytes: How much may be in memory; half of what is free if left out.

    Attributes:
        num_decomposed: How many matrices were decomposed.
        norms: By recipe, the two norms of the whole model that LiNeS takes its alpha from.

    Example:
        >>> from lightning_drm import DRM
        >>> deltas = [torch.eye(3), 2 * torch.eye(3)]
        >>> with Decompositions() as kept:
        ...     for density in (0.1, 0.2):
        ...         merged = kept.merging("layer.weight")(DRM(density=density), deltas, [1.0, 1.0])
        >>> kept.num_decomposed, merged[0, 0].item()
        (1, 1.5)
    """

    def __init__(self, folder: Path | None = None, max_bytes: int | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._in_memory: dict[Hashable, Any] = {}
        self._on_disk: dict[Hashable, tuple[Path, type]] = {}
        self._num_bytes = 0
        self._files: Path | None = None
        self.num_decomposed = 0
        self.norms: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            shutil.rmtree(self._files)
        self._files = None
        self._in_memory.clear()
        self._on_disk.clear()
        self.norms.clear()
        self._num_bytes = 0

    def merging(self, name: str) -> Merge:
        """What takes the place of `Method.merge` while one parameter is merged.

        Args:
            name: The parameter's name. Its matrices, if there are several, must come in the same order each time.
        """
        prepare = self.preparing(name)

        def merge(method: Method, deltas: Sequence[Delta], coefficients: Sequence[float]) -> Tensor:
            if not isinstance(method, PreparedMethod):
                return method.merge(deltas, coefficients)
            merged = densify(method.merge_prepared(prepare(method, deltas), coefficients))
            check_result(type(method).__name__, merged, deltas)
            return merged

        return merge

    def preparing(self, name: str) -> Callable[[PreparedMethod, Sequence[Delta]], Any]:
        """What takes the place of `PreparedMethod.prepare` for one parameter.

        Args:
            name: As for `merging`.
        """
        numbers = itertools.count()

        def prepare(method: PreparedMethod, deltas: Sequence[Delta]) -> Any:
            key = (name, next(numbers), type(method), method.preparation)
            prepared = self._kept(key)
            if prepared is None:
                prepared = method.prepare(deltas)
                self.num_decomposed += 1
                self._keep(key, prepared)
            return prepared

        return prepare

    def _kept(self, key: Hashable) -> Any:
        if key in self._in_memory:
            return self._in_memory[key]
        if key not in self._on_disk:
            return None
        file, kind = self._on_disk[key]
        with torch.serialization.safe_globals([kind]):
            return torch.load(file, weights_only=True)

    def _keep(self, key: Hashable, prepared: Any) -> None:
        size = sum(tensor.nbytes for tensor in _tensors(prepared))
        device = next((tensor.device for tensor in _tensors(prepared)), torch.device("cpu"))
        if self._max_bytes is None:
            self._max_bytes = int(_MEMORY * free_bytes(device))
        if self._num_bytes + size <= self._max_bytes:
            self._in_memory[key] = prepared
            self._num_bytes += size
            return
        if self._files is None:
            self._files = Path(tempfile.mkdtemp(prefix="decompositions-", dir=self._folder))
        file = self._files / f"{len(self._on_disk)}.pt"
        torch.save(prepared, file)
        self._on_disk[key] = file, type(prepared)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple | list) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in _tensors(part)]
