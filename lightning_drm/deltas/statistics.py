"""A task's statistics: what was collected, in memory or in ``statistics.safetensors`` beside the task's deltas.

Layers that share their inputs (query, key and value of an attention) share one Gram matrix, which is stored once. The
file names the deltas that it belongs to: beside others it counts as not there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

from torch import Tensor

from lightning_drm.deltas.hashed_file import HashedFile, write_hashed
from lightning_drm.merging import Need, Statistics

STATISTICS_FILE = "statistics.safetensors"

_FORMAT = "lightning_drm.statistics/2"
_WITHOUT_EXPERTS = "lightning_drm.statistics/1"


@dataclass(frozen=True)
class Collected:
    """How statistics of one kind were collected.

    Attributes:
        num_samples: How many training samples were asked for; a smaller training set was used whole.
        count_padding: Whether the positions of padding counted.
        propagated: Whether inputs came through merged blocks; these are only good for one merge, and never stored.
    """

    num_samples: int = 256
    count_padding: bool = False
    propagated: bool = False


@dataclass(frozen=True)
class TaskStatistics:
    """Statistics of one task by parameter.

    Attributes:
        tensors: Gram matrices and Fisher information by key, in float32. The mapping may read from disk.
        keys: By what they are, and by parameter, the key of its tensor.
        collected: By what they are, how they were collected.
        fisher_norm: Norm of the Fisher information over all parameters.
    """

    tensors: Mapping[str, Tensor]
    keys: Mapping[Need, Mapping[str, str]]
    collected: Mapping[Need, Collected]
    fisher_norm: float | None = None

    def names(self, need: Need) -> set[str]:
        """The parameters that have such statistics."""
        return set(self.keys.get(need, ()))

    def read(self, name: str, need: Need) -> Statistics:
        """What a method needs of one parameter."""
        tensor = self.tensors[self.keys[need][name]]
        return Statistics(gram=tensor) if need == "gram" else Statistics(fisher=tensor, fisher_norm=self.fisher_norm)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same of some parameters, under other names.

        Args:
            names: By the new name, the old one.
        """
        keys = {need: {name: own[old] for name, old in names.items() if old in own} for need, own in self.keys.items()}
        return replace(self, keys=keys)

    def with_more(self, other: "TaskStatistics", need: Need) -> Self:
        """These statistics, and those of the same kind of other parameters."""
        keys = {**self.keys, need: {**self.keys[need], **other.keys[need]}}
        return replace(self, tensors={**self.tensors, **other.tensors}, keys=keys)

    def together_with(self, other: "TaskStatistics") -> Self:
        """These statistics, and those of another kind."""
        return type(self)(
            {**self.tensors, **other.tensors},
            {**self.keys, **other.keys},
            {**self.collected, **other.collected},
            other.fisher_norm if other.fisher_norm is not None else self.fisher_norm,
        )


def save_statistics(statistics: TaskStatistics, folder: Path, task: str, deltas: str | None) -> None:
    """Stores a task's statistics beside its deltas.

    Args:
        statistics: The statistics.
        folder: The task's folder.
        task: The task's name.
        deltas: Fingerprint of the deltas that they belong to.
    """
    write_hashed(
        folder / STATISTICS_FILE,
        statistics.tensors,
        {
            "format": _FORMAT,
            "task": task,
            "deltas": json.dumps(deltas),
            "keys": json.dumps(statistics.keys),
            "collected": json.dumps({need: asdict(how) for need, how in statistics.collected.items()}),
            "fisher_norm": json.dumps(statistics.fisher_norm),
        },
    )


def load_statistics(folder: Path, deltas: str | None) -> TaskStatistics | None:
    """Opens a task's statistics, whose tensors stay on disk until they are asked for.

    Args:
        folder: The task's folder.
        deltas: Fingerprint of the task's deltas.

    Returns:
        The statistics; ``None`` if there are none of these deltas, or only those that an earlier version took.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return None
    file = HashedFile(path, "statistics", "remove the file, and collect the statistics again")
    try:
        if file.metadata.get("format") == _WITHOUT_EXPERTS:
            return None  # so that they are collected again, with those of experts
        if file.metadata.get("format") != _FORMAT:
            raise ValueError("its format is another")
        if json.loads(file.metadata["deltas"]) != deltas:
            return None
        keys, collected = file.described("keys"), file.described("collected")
        if {key for own in keys.values() for key in own.values()} != file.headers.keys() or not (
            keys.keys() == collected.keys() <= set(get_args(Need))
        ):
            raise ValueError("it does not say what its tensors are")
        how = {need: Collected(**given) for need, given in collected.items()}
        norm = json.loads(file.metadata["fisher_norm"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and collect the statistics again.") from error
    return TaskStatistics(_Stored(file), cast(Any, keys), cast(Any, how), norm)


@dataclass(frozen=True)
class _Stored(Mapping[str, Tensor]):
    """The tensors of a file, read when indexed."""

    file: HashedFile = field(repr=False)

    def __getitem__(self, key: str) -> Tensor:
        return self.file.read(key)

    def __iter__(self) -> Any:
        return iter(self.file.headers)

    def __len__(self) -> int:
        return len(self.file.headers)
