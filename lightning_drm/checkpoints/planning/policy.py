"""What a user decides about models that do not fit each other, and about the form of the result."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy

MissingPolicy = Literal["strict", "intersection", "base_fill"]
"""Refuse; merge only what all tasks have; count a parameter that a task lacks as unchanged by it."""

OutputFormat = Literal["auto", "full", "adapter"]
OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MismatchPolicy:
    """How a merge of checkpoints deals with inputs that do not fit, and in which form it writes.

    Attributes:
        policy: What to do about parameters that a task or the base lacks: refuse (``strict``), merge only what all
            have (``intersection``), or count what a task lacks as unchanged by it (``base_fill``).
        vocabulary: What to do about vocabularies that differ: refuse (``strict``), keep the base's tokens (``base``),
            or merge only the tokens that all have (``intersection``).
        heads: Patterns of the heads' names; known from the models' classes if left out.
        output_format: A whole model (``full``), an adapter (if all inputs are adapters), or the smaller one that is
            exact (``auto``).
        dtype: Precision of the written weights; each parameter's own if ``auto``.
        rank: Largest rank of a merged adapter; as high as is exact if left out.
        dequantize: Read quantized weights as the floats that they stand for, and write floats.
    """

    policy: MissingPolicy = "strict"
    vocabulary: VocabularyPolicy = "strict"
    heads: list[str] | None = None
    output_format: OutputFormat = "auto"
    dtype: OutputDtype = "auto"
    rank: int | None = None
    dequantize: bool = False

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The precision of the written weights; ``None`` for each one's own."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.dtype)

    def problems(self) -> list[str]:
        """One sentence for each word that is not one of those above."""
        words = {
            "policy": MissingPolicy,
            "vocabulary": VocabularyPolicy,
            "output_format": OutputFormat,
            "dtype": OutputDtype,
        }
        return [
            f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}."
            for name, allowed in words.items()
            if getattr(self, name) not in get_args(allowed)
        ]
