"""What headers say of one task, held against the base: names, shapes, head, vocabulary, and all that is wrong."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_drm.checkpoints.architecture import Architecture
from lightning_drm.checkpoints.architecture.alignment import Alignment
from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy, row_map, token_rows
from lightning_drm.checkpoints.reading import BaseModel, Entry, TaskInput, quick_fingerprint
from lightning_drm.deltas import hash_tensor

MissingPolicy = Literal["strict", "intersection", "base_fill"]
"""Refuse; merge only what all tasks have; a parameter that a task lacks counts as unchanged by it."""

_HASHED_AT_ONCE = 64 << 20  # bytes of the base that are compared with stored hashes before anything is merged


@dataclass
class PlannedTask:
    """One task, matched with the base.

    Attributes:
        name: The task's name.
        input: Its files.
        names: The base's name to the task's own, for every parameter that has a delta.
        transposed: Names whose factors are for the transposed weight.
        head: Own names of its head's parameters.
        missing: The base's names that the task should have but has not.
        unfit: The base's names of parameters that do not fit to it.
        rows: By name, the task's row for each row of the base, where vocabularies differ.
        problems: What keeps it from being merged.
        notes: What a user should know.
    """

    name: str
    input: TaskInput
    names: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    head: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unfit: set[str] = field(default_factory=set)
    rows: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Matcher:
    """Matches tasks with one base.

    Args:
        base: The base.
        architecture: What is known of it, under its files' names.
        policy: What to do about parameters that are missing or unknown.
        vocabulary: What to do about vocabularies that differ.
        heads: Patterns of the heads' names; told from the models' classes if left out.
    """

    def __init__(
        self,
        base: BaseModel,
        architecture: Architecture,
        policy: MissingPolicy,
        vocabulary: VocabularyPolicy,
        heads: Sequence[str] | None,
    ) -> None:
        self.base, self.architecture, self.heads = base, architecture, heads
        self.policy, self.vocabulary = policy, vocabulary
        headers = base.tensors.headers
        self.ties = {tied: source for tied, source in architecture.ties.items() if source in headers}
        self.names = {name for name in headers if name not in self.ties and headers[name].dtype.is_floating_point}

    def match(self, task: str, found: TaskInput) -> PlannedTask:
        """Holds one task against the base.

        Args:
            task: Its name.
            found: Its files.
        """
        planned = PlannedTask(task, found)
        align = Alignment.between(found.entries, self.names | self.ties.keys() | self.architecture.files.keys())
        if not align.num_matches:
            planned.problems.append(
                f"{task}: none of its {len(found.entries)} parameters is in the base, "
                f"which has {', '.join(sorted(self.names)[:2])}, …; it has {', '.join(list(found.entries)[:2])}, …."
            )
            return planned
        own = Architecture.of_folder(found.folder).named_like(set(found.entries))
        backbone = own.backbone
        rows = self._token_rows(planned)
        unknown = []
        for raw, entry in found.entries.items():
            name = self._base_name(align(raw)) if align.covers(raw) else None
            if self._is_head(raw, name, backbone, align, entry, found):
                planned.head.append(raw)
            elif name in self.ties:
                self._match_tied(planned, raw, name, entry, align)
            elif name is None or name not in self.names:
                unknown.append(raw)
            elif self._fits(planned, name, entry, rows):
                planned.names[name] = raw
            else:
                planned.unfit.add(name)
        region = align.add + backbone.removeprefix(align.strip) if backbone.startswith(align.strip) else align.add
        self._note_missing(planned, own, align, region)
        self._note_unknown(planned, unknown, align, region)
        self._check_base(planned)
        self._note_precision(planned)
        return planned

    def _base_name(self, name: str) -> str:
        """The base file's name of an aligned name, which may be the live model's."""
        if name in self.names or name in self.ties:
            return name
        live = self.architecture.live_name(name)
        return live if live in self.names else self.architecture.files.get(live, name)

    def is_shared(self, name: str) -> bool:
        """Whether a base's parameter is outside its own head."""
        if self.heads is not None:
            return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.heads)
        return name.startswith(self.architecture.backbone)

    def _is_head(
        self, raw: str, name: str | None, backbone: str, align: Alignment, entry: Entry, found: TaskInput
    ) -> bool:
        if self.heads is not None:
            return any(fnmatch.fnmatchcase(part, pattern) for pattern in self.heads for part in (raw, name or raw))
        if not raw.startswith(backbone) or not align.covers(raw):
            return True
        if name in self.names:
            return not self.is_shared(name or raw)
        return not found.whole and entry.form == "value"  # saved with an adapter, and not the base's

    def _match_tied(self, planned: PlannedTask, raw: str, name: str, entry: Entry, align: Alignment) -> None:
        source = self.ties[name]
        if entry.form != "value":
            planned.problems.append(
                f"{planned.name}: changes {name} alone, which the base ties to {source}; merge with an untied base."
            )
        elif not any(self._base_name(align(other)) == source for other in planned.input.entries):
            planned.names[source] = raw

    def _fits(self, planned: PlannedTask, name: str, entry: Entry, rows: dict[int, int] | None) -> bool:
        header = self.base.tensors.headers[name]
        shape = entry.shape
        if entry.form == "low_rank_linear":
            known = self.architecture.known
            if name in self.architecture.transposed or (not known and shape != header.shape == shape[::-1]):
                planned.transposed.add(name)
                shape = shape[::-1]
        tokens = name in self.architecture.vocabulary
        if tokens and entry.form == "value" and shape[1:] == header.shape[1:]:
            if self.vocabulary == "strict" and shape != header.shape:
                planned.problems.append(
                    f"{planned.name}: {name} has {shape[0]} rows, the base's vocabulary has {header.shape[0]}; "
                    "choose --vocabulary base or intersection."
                )
                return False
            if (mapped := row_map(rows, header.shape[0], shape[0])) is not None:
                planned.rows[name] = mapped
            return True
        if shape != header.shape:
            planned.problems.append(f"{planned.name}: {name} has shape {shape}, the base's has {header.shape}.")
            return False
        if entry.dtype.itemsize < 2:
            planned.problems.append(f"{planned.name}: {name} is in {entry.dtype}, which is a quantized type.")
            return False
        return True

    def _token_rows(self, planned: PlannedTask) -> dict[int, int] | None:
        rows = token_rows(self.base.folder, planned.input.folder) if self.architecture.vocabulary else None
        if rows is None:
            return None
        moved = sum(row != other for row, other in rows.items())
        what = f"shares {len(rows)} tokens with the base's, {moved} of them at another row"
        if self.vocabulary == "strict":
            planned.problems.append(f"{planned.name}: its tokenizer {what}; choose --vocabulary base or intersection.")
        else:
            planned.notes.append(f"{planned.name}: its tokenizer {what}; rows are matched by token.")
        return rows

    def _note_missing(self, planned: PlannedTask, own: Architecture, align: Alignment, region: str) -> None:
        """Parameters of the base that the task lacks. A submodule that its class never had is not missing."""
        if not planned.input.whole:
            return
        there = {_submodule(name, region) for name in planned.names}
        has = {self._base_name(align(name)) for name in own.kinds}
        for name in sorted(self.names - planned.names.keys() - planned.unfit):
            never_had = own.known and name not in has and _submodule(name, region) not in there
            if name.startswith(region) and self.is_shared(name) and not never_had:
                planned.missing.append(name)
        self._complain(planned, planned.missing, "lacks {} of the base's parameters", "")

    def _note_unknown(self, planned: PlannedTask, unknown: list[str], align: Alignment, region: str) -> None:
        """Parameters that the base lacks. A submodule that the base's class never had goes with the head."""
        known = {_submodule(name, region) for name in self.names}
        extra = []
        for raw in unknown:
            name = self._base_name(align(raw))
            is_value = planned.input.entries[raw].form == "value"
            if self.architecture.known and is_value and _submodule(name, region) not in known:
                planned.head.append(raw)
            else:
                extra.append(raw)
        self._complain(planned, extra, "has {} parameters that the base has not", " They are left out.")

    def _complain(self, planned: PlannedTask, names: list[str], what: str, consequence: str) -> None:
        if not names:
            return
        listed = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        text = f"{planned.name}: {what.format(len(names))}: {listed}"
        if self.policy == "strict":
            planned.problems.append(f"{text}; choose --policy intersection or base_fill, or name --heads.")
        else:
            planned.notes.append(f"{text}.{consequence}")

    def _check_base(self, planned: PlannedTask) -> None:
        spent = 0
        for name, raw in sorted(planned.names.items(), key=lambda item: self._bytes(item[0])):
            spent += self._bytes(name)
            if spent > _HASHED_AT_ONCE:
                break
            if self._differs(planned.input, name, raw):
                planned.problems.append(
                    f"{planned.name}: its deltas were taken from another base: {name} differs from {self.base.name}."
                )
                return
        named = planned.input.base_name
        if named is None or named == self.base.name:
            return
        other = Path(named).expanduser()
        if self.base.folder is None or not other.is_dir():
            if not other.is_dir() and not Path(self.base.name).expanduser().exists():
                planned.problems.append(f"{planned.name}: was trained on {named}, not on the base {self.base.name}.")
            else:
                planned.notes.append(f"{planned.name}: names {named} as its base, which cannot be compared here.")
        elif not other.samefile(self.base.folder):
            theirs = [other / file.name for file in self.base.tensors.files]
            same = all(file.is_file() for file in theirs) and (
                quick_fingerprint(theirs) == quick_fingerprint(self.base.tensors.files)
            )
            if not same:
                planned.problems.append(f"{planned.name}: was trained on {named}, which is not {self.base.name}.")

    def _differs(self, found: TaskInput, name: str, raw: str) -> bool:
        """Whether a finetune says of a parameter that it had another value in its base."""
        if raw in found.base_hashes:
            return hash_tensor(self.base.tensors.read(name)) != found.base_hashes[raw]
        frozen = found.base_value(raw)
        return frozen is not None and not torch.equal(frozen.double(), self.base.tensors.read(name).double())

    def _bytes(self, name: str) -> int:
        header = self.base.tensors.headers[name]
        return torch.Size(header.shape).numel() * header.dtype.itemsize

    def _note_precision(self, planned: PlannedTask) -> None:
        headers = self.base.tensors.headers
        coarse = {
            planned.input.entries[raw].dtype
            for name, raw in planned.names.items()
            if planned.input.entries[raw].form == "value"
            and planned.input.entries[raw].dtype.itemsize < headers[name].dtype.itemsize
        }
        if coarse:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
            planned.notes.append(
                f"{planned.name}: is stored in {kinds}, coarser than the base, so rounding of its weights is part of "
                "its deltas."
            )


def _submodule(name: str, region: str) -> str:
    """The part of a name that tells a model's submodules apart: ``pooler`` in ``bert.pooler.dense.weight``."""
    return name.removeprefix(region).partition(".")[0]
