"""The files of a model folder: one, or the shards that an index names."""

from collections.abc import Mapping
from pathlib import Path

from lightning_drm.checkpoints.reading.tensors import CONTAINERS, Tensors
from lightning_drm.storage.json_files import read_object, shown


def has_model(folder: Path) -> bool:
    """Whether a folder holds a model's weights."""
    return any(file.is_file() for container in CONTAINERS for file in _files(folder, container))


def open_model(folder: Path) -> Tensors:
    """The weights of a model folder.

    Args:
        folder: A folder that holds a model.

    Raises:
        ValueError: If a file is damaged, or an index and its shards do not agree.
    """
    for container in CONTAINERS:
        file, index = _files(folder, container)
        if file.is_file():
            return container([file])
        if index.is_file():
            shards = _shards(index)
            tensors = container([index.parent / name for name in sorted(set(shards.values()))])
            _require_agreement(index, shards, tensors)
            return tensors
    raise ValueError(f"{folder} holds no model.")


def _files(folder: Path, container: type[Tensors]) -> tuple[Path, Path]:
    return folder / container.model_file, folder / f"{container.model_file}.index.json"


def _shards(index: Path) -> Mapping[str, str]:
    """By parameter, the name of its shard, which is a file beside the index."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: weight_map must name the shard of each parameter, got {shown(shards)}.")
    # A link that has the shard's name may lead anywhere, as those of the hub's cache do: whoever made the folder made
    # it. A name that leaves the folder is the work of whoever wrote the index, who may be anybody.
    outside = {name: shard for name, shard in shards.items() if not _is_beside(shard)}
    if outside:
        listed = ", ".join(f"{shown(shard)} for {name}" for name, shard in list(outside.items())[:3])
        raise ValueError(f"{index}: expected the names of files beside it in weight_map, got {listed}.")
    missing = sorted({name for name in shards.values() if not (index.parent / name).is_file()})
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing[:3])}.")
    return shards


def _is_beside(shard: object) -> bool:
    """Whether a shard's name is nothing but the name of a file, on any system."""
    if not isinstance(shard, str) or shard in ("", ".", ".."):
        return False
    return shard.isprintable() and not set(shard) & set("/\\:")


def _require_agreement(index: Path, shards: Mapping[str, str], tensors: Tensors) -> None:
    wrong = [name for name, shard in shards.items() if tensors.file_of.get(name) != index.parent / shard]
    if wrong:
        shard = shards[wrong[0]]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{index} lists {wrong[0]} in {shard}, which does not hold it{more}.")
