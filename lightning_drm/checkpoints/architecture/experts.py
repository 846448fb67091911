"""Where a file keeps the experts of a layer: in one tensor, as the live model does, or in tensors of their own.

transformers fuses experts as it loads a model and takes them apart as it saves one. So a base from the hub has
``experts.0.w1.weight``, … where an adapter or a checkpoint of the live module has ``experts.gate_up_proj``. Which rows
are whose is not written down here for each architecture: numbered rows go through transformers' own conversion, and
come out where it would save them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_drm.merging import Delta, LowRankStack
from lightning_drm.merging.low_rank import densify, rows_of


@dataclass(frozen=True)
class ExpertPart:
    """Some rows of one expert: what a tensor of a file has of a weight with all experts.

    Attributes:
        stack: The live model's name of the weight (E, m, n).
        expert: Which expert.
        start: The first of the expert's rows.
        stop: The row after the last one.
    """

    stack: str
    expert: int
    start: int
    stop: int

    def of(self, delta: Delta) -> Delta:
        """This part of a delta (E, m, n), or of a value."""
        matrix = delta.matrix(self.expert) if isinstance(delta, LowRankStack) else densify(delta)[self.expert]
        return rows_of(matrix, slice(self.start, self.stop))


@dataclass(frozen=True)
class ExpertFiles:
    """What a model's files may hold in place of its experts.

    Attributes:
        parts: By the name of a tensor of a file, the part of a weight that it holds.
        whole: Names of tensors that hold all experts, under another name or turned.
    """

    parts: Mapping[str, ExpertPart] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @classmethod
    def of_model(cls, model: PreTrainedModel, stacks: Iterable[str]) -> "ExpertFiles":
        """Finds out where transformers would save experts.

        Args:
            model: The model, which may be on the meta device.
            stacks: The names of its weights with experts.
        """
        parts: dict[str, ExpertPart] = {}
        whole: set[str] = set()
        for name in stacks:
            num_experts, num_rows, _ = model.get_parameter(name).shape
            for file_name, rows in _saved(model, name, num_experts, num_rows).items():
                if rows.ndim == 3 and file_name != name:
                    whole.add(file_name)
                elif rows.ndim == 2 and (part := _part(name, rows[:, :1].flatten(), num_rows)) is not None:
                    parts[file_name] = part
        return cls(parts, frozenset(whole))


def _saved(model: PreTrainedModel, name: str, num_experts: int, num_rows: int) -> dict[str, Tensor]:
    """The tensors of a file, with the numbers of the rows that they hold: row r of expert e is e · num_rows + r."""
    numbers = torch.arange(num_experts * num_rows, dtype=torch.int32).view(num_experts, num_rows, 1)
    try:
        found: dict[str, Tensor] = revert_weight_conversion(model, {name: numbers})
    except (RuntimeError, ValueError, IndexError):  # a conversion that needs more than numbered rows: nothing is known
        return {}
    return found


def _part(stack: str, rows: Tensor, num_rows: int) -> ExpertPart | None:
    """The part that consists of these rows, where they are rows of one expert in their order."""
    first, last = int(rows[0]), int(rows[-1])
    if not torch.equal(rows, torch.arange(first, last + 1, dtype=rows.dtype)) or first // num_rows != last // num_rows:
        return None
    return ExpertPart(stack, first // num_rows, first % num_rows, last % num_rows + 1)
