"""Whether a task started from the base that it is merged into, as far as its files say."""

from pathlib import Path

import torch

from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.reading import BaseModel, TaskInput, quick_fingerprint
from lightning_drm.checkpoints.reading.card import metadata_of
from lightning_drm.deltas import hash_tensor
from lightning_drm.pretrained import hub_name, public_name

_HASHED_AT_ONCE = 64 << 20  # bytes of the base that are compared with stored hashes before anything is merged


def check_same_base(planned: PlannedTask, base: BaseModel) -> None:
    """Adds a problem to a task that was trained on another base, and a note to one of which this is not known.

    Args:
        planned: The task, matched with the base.
        base: The base.
    """
    different = _different_value(planned, base)
    if different is not None:
        planned.problems.append(
            f"{planned.name}: its deltas were taken from another base: {different} differs from {base.name}."
        )
        return
    named = planned.input.base_name
    if named is None:
        _look_at_card(planned, base)
    if named is None or named == base.name or (hub_name(named) or named) == hub_name(base.name):
        return
    other = Path(named).expanduser()
    if other.is_dir() and base.folder is not None:
        if not other.samefile(base.folder) and not _same_files(other, base):
            planned.problems.append(f"{planned.name}: was trained on {named}, which is not {base.name}.")
    elif other.is_dir() or Path(base.name).expanduser().exists():
        planned.notes.append(
            f"{planned.name}: was trained on {public_name(named)}; whether that is the base {public_name(base.name)} "
            "cannot be checked here."
        )
    else:
        planned.problems.append(f"{planned.name}: was trained on {named}, not on the base {base.name}.")


def _look_at_card(planned: PlannedTask, base: BaseModel) -> None:
    """Adds a note if the task's model card names another base than the one that was given by its name on the hub.

    A card is written by hand, and a model may have several names, so it is no proof.
    """
    named = metadata_of(planned.input.folder).get("base_model")
    on_hub = hub_name(base.name)
    if not isinstance(named, str) or on_hub is None:
        return
    if named.rpartition("/")[2] != on_hub.rpartition("/")[2]:
        planned.notes.append(f"{planned.name}: its model card names {named} as its base, not {base.name}.")


def _different_value(planned: PlannedTask, base: BaseModel) -> str | None:
    """The first parameter that had another value where the task started; the smallest ones are compared."""
    compared = 0
    alike = {name: raw for name, raw in planned.names.items() if name not in planned.parts}  # others come at their turn
    for name, raw in sorted(alike.items(), key=lambda item: _num_bytes(base, item[0])):
        compared += _num_bytes(base, name)
        if compared > _HASHED_AT_ONCE:
            return None
        if _differs(planned.input, base, name, raw):
            return name
    return None


def _differs(found: TaskInput, base: BaseModel, name: str, raw: str) -> bool:
    if raw in found.base_hashes:
        return hash_tensor(base.tensors.read(name)) != found.base_hashes[raw]
    frozen = found.base_value(raw)
    return frozen is not None and not torch.equal(frozen.double(), base.tensors.read(name).double())


def _same_files(folder: Path, base: BaseModel) -> bool:
    files = [folder / file.name for file in base.tensors.files]
    return all(file.is_file() for file in files) and quick_fingerprint(files) == quick_fingerprint(base.tensors.files)


def _num_bytes(base: BaseModel, name: str) -> int:
    header = base.tensors.headers[name]
    return torch.Size(header.shape).numel() * header.dtype.itemsize
