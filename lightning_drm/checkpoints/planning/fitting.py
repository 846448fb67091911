"""Whether a task's parameter fits the base's: in shape, in precision, and token by token."""

from lightning_drm.checkpoints.architecture import Architecture
from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy, row_map, token_rows
from lightning_drm.checkpoints.planning.planned_task import PlannedTask
from lightning_drm.checkpoints.reading import BaseModel, Entry


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
        if entry.form == "low_rank_linear" and self._is_turned(name, shape):
            self._planned.transposed.add(name)
            shape = shape[::-1]
        if name in self._architecture.vocabulary and entry.form == "value" and shape[1:] == header.shape[1:]:
            return self._fits_by_row(name, shape[0])
        if shape != header.shape:
            self._refuse(f"{name} has shape {shape}, the base's has {header.shape}")
            return False
        if entry.dtype.itemsize < 2:
            self._refuse(f"{name} is in {entry.dtype}, which is a quantized type")
            return False
        return True

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

    def _is_turned(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a linear layer's factors make the transpose of the stored weight, as in a Conv1D."""
        base_shape = self._headers[name].shape
        unknown = not self._architecture.known and shape != base_shape == shape[::-1]
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
