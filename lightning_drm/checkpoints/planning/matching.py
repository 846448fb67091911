"""Holding one task against the base, from headers alone: which parameter is which, what is a head, what is missing."""

import fnmatch
from collections.abc import Mapping, Sequence

import torch

from lightning_drm.checkpoints.architecture import Architecture, ExpertPart
from lightning_drm.checkpoints.architecture.alignment import Alignment
from lightning_drm.checkpoints.planning.fitting import Fitting
from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.planning.policy import MismatchPolicy
from lightning_drm.checkpoints.planning.same_base import check_same_base
from lightning_drm.checkpoints.reading import BaseModel, Entry, TaskInput, note_on_ignored
from lightning_drm.checkpoints.reading.adapter import LoraInput
from lightning_drm.deltas import Kind, guess_kind
from lightning_drm.merging.low_rank import densify


class Matcher:
    """Matches tasks with one base.

    Args:
        base: The base.
        architecture: What is known of it, under its files' names.
        mismatch: What to do about what does not fit.

    Attributes:
        ties: Name of each tied tensor of the base to the name of the one that is stored.
        names: Names of the base's other floating-point tensors.
    """

    def __init__(self, base: BaseModel, architecture: Architecture, mismatch: MismatchPolicy) -> None:
        self._base, self._architecture, self._mismatch = base, architecture, mismatch
        headers = base.tensors.headers
        self.ties = {tied: source for tied, source in architecture.ties.items() if source in headers}
        self.names = {name for name in headers if name not in self.ties and headers[name].dtype.is_floating_point}
        by_stack: dict[str, dict[str, ExpertPart]] = {}
        for name, part in sorted(architecture.experts.items(), key=lambda item: (item[1].expert, item[1].start)):
            by_stack.setdefault(part.stack, {})[name] = part
        # Where the base has single experts, but a task may have all in one; and where it is the other way around.
        self._parts = {stack: parts for stack, parts in by_stack.items() if parts.keys() <= self.names}
        self._stacked = {stack: parts for stack, parts in by_stack.items() if stack in self.names}
        self._patterns_found: set[str] = set()

    def problems(self) -> list[str]:
        """Tied tensors that the base has with values of their own; transformers does not tie them then."""
        tensors = self._base.tensors
        return [
            f"The base's configuration ties {tied} to {source}, but its files hold other values for it: set "
            "tie_word_embeddings to false in its config.json."
            for tied, source in self.ties.items()
            if tied in tensors.headers and not torch.equal(tensors.read(tied), tensors.read(source))
        ]

    def problems_of_heads(self) -> list[str]:
        """One sentence for each pattern of heads that named nothing in the base or in a task that was matched."""
        found = self._patterns_found.union(*map(self._patterns_of, self._base.tensors.headers))
        return [
            f"heads: the pattern {pattern!r} matches nothing in the base or in a task."
            for pattern in self._mismatch.heads or []
            if pattern not in found
        ]

    def match(self, task: str, found: TaskInput) -> PlannedTask:
        """Holds one task against the base.

        Args:
            task: Its name.
            found: What its files say.
        """
        planned = PlannedTask(task, found)
        try:
            self._match(planned, found)
        except ValueError as error:  # a file beside the weights is damaged
            planned.problems.append(f"{task}: {error}")
        return planned

    def _match(self, planned: PlannedTask, found: TaskInput) -> None:
        if isinstance(found, LoraInput):
            found.resolve(self._kinds(), in_order=self._architecture.known)
        single = {name for parts in self._stacked.values() for name in parts}
        targets = self.names | self.ties.keys() | self._architecture.files.keys() | self._parts.keys() | single
        align = Alignment.between(found.entries, targets)
        if not align.num_matches:
            planned.problems.append(
                f"{planned.name}: none of its {len(found.entries)} parameters is in the base. "
                f"The base has {', '.join(sorted(self.names)[:2])}, …; the task has "
                f"{', '.join(list(found.entries)[:2])}, …."
            )
            return
        own = Architecture.of_folder(found.folder, len(found.entries)).named_like(set(found.entries))
        fitting = Fitting(planned, self._base, self._architecture, self._mismatch.vocabulary)
        unknown = self._sort(planned, own.backbone, align, fitting)
        inside = own.backbone.startswith(align.strip)
        region = align.add + own.backbone.removeprefix(align.strip) if inside else align.add
        self._note_missing(planned, own, align, region)
        self._note_unknown(planned, unknown, align, region)
        check_same_base(planned, self._base)
        fitting.refuse_ambiguous()
        fitting.note_precision()
        if found.ignored:
            planned.notes.append(f"{planned.name}: {note_on_ignored(found.ignored)}")

    def _sort(self, planned: PlannedTask, backbone: str, align: Alignment, fitting: Fitting) -> list[str]:
        """Finds out what each of the task's parameters is; returns the own names of those that the base lacks."""
        unknown = []
        single = {name: stack for stack, parts in self._stacked.items() for name in parts}
        experts: dict[str, dict[str, str]] = {}
        for raw, entry in planned.input.entries.items():
            name = self._base_name(align(raw)) if align.covers(raw) else None
            parts = self._parts.get(name or "", {})
            in_base = next(iter(parts), single.get(name or "", name))
            if self._is_head(raw, in_base, backbone, align, planned.input):
                planned.head.append(raw)
            elif parts:
                self._match_parts(planned, raw, entry, parts, fitting)
            elif name in single:
                experts.setdefault(single[name], {})[name] = raw
            elif name in self.ties:
                self._match_tied(planned, raw, name, entry, align)
            elif name is None or name not in self.names:
                unknown.append(raw)
            elif fitting.fits(name, entry):
                planned.names[name] = raw
            else:
                planned.unfit.add(name)
        for stack, raws in experts.items():
            self._match_stacked(planned, stack, raws, fitting)
        return unknown

    def _match_parts(
        self, planned: PlannedTask, raw: str, entry: Entry, parts: Mapping[str, ExpertPart], fitting: Fitting
    ) -> None:
        """A tensor with all experts, of which each of the base's tensors has a part."""
        if fitting.fits_in_parts(raw, entry, parts):
            planned.parts |= parts
            planned.names |= dict.fromkeys(parts, raw)
        else:
            planned.unfit |= parts.keys()

    def _match_stacked(self, planned: PlannedTask, stack: str, raws: Mapping[str, str], fitting: Fitting) -> None:
        """Tensors that make up one of the base's with all experts."""
        parts, entries = self._stacked[stack], planned.input.entries
        if missing := [name for name in parts if name not in raws]:
            planned.problems.append(
                f"{planned.name}: lacks {len(missing)} of the {len(parts)} tensors that make up {stack}: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
            )
            planned.unfit.add(stack)
        elif fitting.fits_stacked(stack, [entries[raws[name]] for name in parts], list(parts.values())):
            planned.stacked[stack] = [raws[name] for name in parts]
            planned.names[stack] = planned.stacked[stack][0]
        else:
            planned.unfit.add(stack)

    def _kinds(self) -> Mapping[str, Kind]:
        """The kinds of the model's parameters, in the model's order; of a base of an unknown class, in no order."""
        if self._architecture.known:
            return self._architecture.kinds
        return {name: guess_kind(name, self._base.tensors.headers[name].shape) for name in sorted(self.names)}

    def _base_name(self, name: str) -> str:
        """The base file's name for an aligned name, which may be the live model's."""
        if name in self.names or name in self.ties:
            return name
        live = self._architecture.live_name(name)
        return live if live in self.names else self._architecture.files.get(live, name)

    def _is_shared(self, name: str) -> bool:
        """Whether a parameter of the base is outside the base's own head."""
        if self._mismatch.heads is not None:
            return not self._is_named_head(name)
        return name.startswith(self._architecture.backbone)

    def _is_named_head(self, *names: str) -> bool:
        """Whether a pattern matches a parameter, which may have two names."""
        found = set().union(*map(self._patterns_of, names))
        self._patterns_found |= found
        return bool(found)

    def _patterns_of(self, name: str) -> set[str]:
        return {pattern for pattern in self._mismatch.heads or [] if fnmatch.fnmatchcase(name, pattern)}

    def _is_head(self, raw: str, name: str | None, backbone: str, align: Alignment, found: TaskInput) -> bool:
        if self._mismatch.heads is not None:
            return self._is_named_head(raw, name or raw)
        if not raw.startswith(backbone) or not align.covers(raw):
            return True
        if name in self.names:
            return not self._is_shared(name or raw)
        # Saved with an adapter; the base lacks it. What the base ties is compared with what it is tied to instead.
        return name not in self.ties and not found.whole and found.entries[raw].form == "value"

    def _match_tied(self, planned: PlannedTask, raw: str, name: str, entry: Entry, align: Alignment) -> None:
        source = self.ties[name]
        if entry.form != "value":
            planned.problems.append(
                f"{planned.name}: changes {name}, but not {source}, to which the base ties it; "
                "merge into a base whose weights are not tied."
            )
            return
        found = planned.input
        stored = next((other for other in found.entries if self._base_name(align(other)) == source), None)
        if stored is None and found.whole:
            planned.names[source] = raw
            return
        value = densify(found.read(raw))
        if stored is not None and found.entries[stored].form == "value":
            agrees = torch.equal(densify(found.read(stored)), value)
        else:  # peft saves it, as it was, beside an adapter of the embedding
            agrees = torch.equal(value.float(), self._base.tensors.read(source).float())
        if stored is None and not agrees:
            planned.names[source] = raw
        elif not agrees:
            planned.problems.append(
                f"{planned.name}: {raw} and {stored} differ, but the base ties them into one; merge into a base whose "
                "weights are not tied."
            )

    def _note_missing(self, planned: PlannedTask, own: Architecture, align: Alignment, region: str) -> None:
        """Parameters of the base that the task lacks. A submodule that the task's class never had is not missing."""
        if not planned.input.whole:
            return
        there = {_submodule(name, region) for name in planned.names}
        has = {self._base_name(align(name)) for name in own.kinds}
        for name in sorted(self.names - planned.names.keys() - planned.unfit):
            never_had = own.known and name not in has and _submodule(name, region) not in there
            if name.startswith(region) and self._is_shared(name) and not never_had:
                planned.missing.append(name)
        if planned.missing:
            self._complain(planned, f"lacks {len(planned.missing)} of the base's parameters", planned.missing, "")

    def _note_unknown(self, planned: PlannedTask, unknown: list[str], align: Alignment, region: str) -> None:
        """Parameters that the base lacks. A submodule that the base's class never had belongs to the head."""
        known = {_submodule(name, region) for name in self.names}
        extra = []
        for raw in unknown:
            name = self._base_name(align(raw))
            is_value = planned.input.entries[raw].form == "value"
            if self._architecture.known and is_value and _submodule(name, region) not in known:
                planned.head.append(raw)
            else:
                extra.append(raw)
        if extra:
            count = "a parameter" if len(extra) == 1 else f"{len(extra)} parameters"
            self._complain(planned, f"has {count} that the base lacks", extra, " They are left out.")

    def _complain(self, planned: PlannedTask, what: str, names: Sequence[str], consequence: str) -> None:
        text = f"{planned.name}: {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        if self._mismatch.policy == "strict":
            planned.problems.append(f"{text}; set policy to intersection or base_fill, or name the heads.")
        else:
            planned.notes.append(f"{text}.{consequence}")


def _submodule(name: str, region: str) -> str:
    """The submodule that a parameter is in: ``pooler`` for ``bert.pooler.dense.weight`` in the region ``bert.``."""
    return name.removeprefix(region).partition(".")[0]
