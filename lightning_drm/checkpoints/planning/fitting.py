"""Whether a task's parameter fits the base's: in shape, in precision, and token by token."""

from collections.abc import Mapping, Sequence

from lightning_drm.checkpoints.architecture import Architecture, ExpertPart
from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy, row_map, token_rows
from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.reading import BaseModel, Entry
from lightning_drm.checkpoints.reading.adapter import LoraInput
from lightning_drm.checkpoints.reading.task_input import Form


class Fitting:
    """Fits one task's parameters to the base's.

    Args:
        planned: The task; problems and notes are added to it, transposed names, and rows where vocabularies differ.
        base: The base.
        architecture: What is known of the base.
        vocabulary: What to do about vocabularies that differ.
    """

    def __init__(
        self, planned: PlannedTask, base: BaseModel, architecture: Architecture, vocabulary: VocabularyPolicy
    ) -> None:
        self._planned, self._architecture, self._vocabulary = planned, architecture, vocabulary
        self._headers = base.tensors.headers
        self._token_rows = self._rows_by_token(base)

    def fits(self, name: str, entry: Entry) -> bool:
        """Whether a parameter can be merged; a problem says why not.

        Args:
            name: The base's name of it.
            entry: What the task says of it.
        """
        header, shape = self._headers[name], entry.shape
        are_square = len(shape) == 3 and shape[1] == shape[2]
        if entry.form == "low_rank_linear" and are_square and not self._architecture.known:
            self._refuse(
                f"{name} has square experts, and how they are stored follows from the model's class; give a base with "
                "a config.json that transformers knows"
            )
            return False
        if entry.form == "low_rank_linear" and self._is_turned(name, shape, header.shape):
            self._planned.transposed.add(name)
            shape = _turned(shape)
        if name in self._architecture.vocabulary and entry.form == "value" and shape[1:] == header.shape[1:]:
            return self._fits_by_row(name, shape[0])
        if shape != header.shape:
            self._refuse(f"{name} has shape {shape}, the base's has {header.shape}")
            return False
        if entry.dtype.itemsize < 2:
            self._refuse(f"{name} is in {entry.dtype}, which is a quantized type")
            return False
        return True

    def fits_in_parts(self, raw: str, entry: Entry, parts: Mapping[str, ExpertPart]) -> bool:
        """Whether a tensor with all experts can be merged with the base's tensors, each of which has a part of it.

        Args:
            raw: The task's own name of it.
            entry: What the task says of it.
            parts: By the base's names, the parts in their order.
        """
        first = next(iter(parts))
        stack, num_experts = parts[first].stack, max(part.expert for part in parts.values()) + 1
        num_rows, width = max(part.stop for part in parts.values()), self._headers[first].shape[-1]
        expected, shape = (num_experts, num_rows, width), entry.shape
        if entry.form == "low_rank_linear" and stack in self._architecture.transposed:
            self._planned.transposed |= parts.keys()
            shape = _turned(shape)
        if shape != expected:
            self._refuse(f"{raw} has shape {shape}, the base's experts make {expected}")
            return False
        form: Form = "low_rank" if entry.rank else entry.form
        found = [
            self.fits(name, Entry((part.stop - part.start, width), entry.dtype, form, entry.rank))
            for name, part in parts.items()
        ]
        return all(found)

    def fits_stacked(self, name: str, entries: Sequence[Entry], parts: Sequence[ExpertPart]) -> bool:
        """Whether a task's tensors make up a tensor of the base's with all experts.

        Args:
            name: The base's name of it.
            entries: What the task says of each part.
            parts: The parts, in their order.
        """
        num_experts, num_rows, width = self._headers[name].shape
        if any(entry.form != "value" for entry in entries):
            self._refuse(f"changes single experts of {name}, which the base holds in one tensor")
            return False
        if [entry.shape for entry in entries] != [(part.stop - part.start, width) for part in parts]:
            self._refuse(f"has experts of other shapes than those of {name}, which has {self._headers[name].shape}")
            return False
        return self.fits(name, Entry((num_experts, num_rows, width), entries[0].dtype))

    def refuse_ambiguous(self) -> None:
        """Refuses square weights that may be stored turned, as a Conv1D's are: no shape says so."""
        found = self._planned.input
        is_flagged = isinstance(found, LoraInput) and bool(found.config.get("fan_in_fan_out"))
        if self._architecture.known or not (is_flagged or self._planned.transposed):
            return
        entries = {name: found.entries[raw] for name, raw in self._planned.names.items()}
        linear = {name: entry.shape for name, entry in entries.items() if entry.form == "low_rank_linear"}
        if square := [name for name, shape in linear.items() if shape == _turned(shape)]:
            self._refuse(
                f"{square[0]} is square, and whether it is stored turned, as in a Conv1D, follows from the model's "
                "class; give a base with a config.json that transformers knows"
            )

    def note_precision(self) -> None:
        """Notes weights that are stored in a coarser precision than the base's."""
        entries = self._planned.input.entries
        coarse = {
            entries[raw].dtype
            for name, raw in self._planned.names.items()
            if entries[raw].form == "value" and entries[raw].dtype.itemsize < self._headers[name].dtype.itemsize
        }
        if coarse:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
            self._note(f"is stored in {kinds}, which is coarser than the base, so its deltas include rounding errors")

    def _is_turned(self, name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> bool:
        """Whether a linear layer's factors make the transpose of the stored weight, as in a Conv1D."""
        unknown = not self._architecture.known and shape != base_shape == _turned(shape)
        return name in self._architecture.transposed or unknown

    def _fits_by_row(self, name: str, num_rows: int) -> bool:
        expected = self._headers[name].shape[0]
        if self._vocabulary == "strict" and num_rows != expected:
            self._refuse(
                f"{name} has {num_rows} rows, but the base's vocabulary has {expected}; "
                "set vocabulary to base or intersection"
            )
            return False
        if (mapped := row_map(self._token_rows, expected, num_rows)) is not None:
            self._planned.rows[name] = mapped
        return True

    def _rows_by_token(self, base: BaseModel) -> dict[int, int] | None:
        rows = token_rows(base.folder, self._planned.input.folder) if self._architecture.vocabulary else None
        if rows is None:
            return None
        moved = sum(row != other for row, other in rows.items())
        what = f"its tokenizer shares {len(rows)} tokens with the base's, {moved} of them in other rows"
        if self._vocabulary == "strict":
            self._refuse(f"{what}; set vocabulary to base or intersection")
        else:
            self._note(f"{what}; rows are matched by token")
        return rows

    def _refuse(self, problem: str) -> None:
        self._planned.problems.append(f"{self._planned.name}: {problem}.")

    def _note(self, note: str) -> None:
        self._planned.notes.append(f"{self._planned.name}: {note}.")


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a transposed matrix, or of a stack of them."""
    return (*shape[:-2], *shape[:-3:-1])
