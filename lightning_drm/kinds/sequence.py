"""A text written in answer to another: translation, summaries, questions (encoder-decoder models)."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn
from torchmetrics import Metric
from transformers import GenerationMixin, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.kinds.kind import IGNORE_INDEX, LABELS
from lightning_drm.kinds.text_metrics import ExactMatch, Rouge
from lightning_drm.kinds.token_prediction import TokenPrediction


class SequenceToSequence(TokenPrediction):
    """A text written in answer to another one. The score is the share of texts that are the expected ones.

    It is learned by the cross entropy of the target's tokens, and measured on what the model writes on its own, as the
    tokenizer decodes it. ROUGE-1, ROUGE-2 and ROUGE-L are measured too.

    Args:
        max_new_tokens: Where the model stops to write, if it has not ended the text before.
        num_beams: How many beginnings are kept while it writes; 1 takes the most likely token each time.

    Attributes:
        tokenizer: Decodes what is written. `SequenceTask` gives its own as it is set up.

    Raises:
        ValueError: If one of the numbers is below 1.
    """

    auto_class: ClassVar[Mapping[str, str]] = {"text": "AutoModelForSeq2SeqLM"}

    def __init__(self, max_new_tokens: int = 64, num_beams: int = 1) -> None:
        wrong = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        if problems := [f"{name} {number}" for name, number in wrong.items() if number < 1]:
            raise ValueError(f"Expected at least 1, got {' and '.join(problems)}.")
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with the same tokenizer, which is large and only read here; modules are copied often."""
        return copy.copy(self)

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        return {"exact_match": ExactMatch(), "rouge": Rouge()}

    @override
    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Each architecture has its own way to begin: a start token, the end token, or a language's.
        shifted = cast(Any, model).prepare_decoder_input_ids_from_labels(labels=batch[LABELS])
        return {**super().inputs(model, batch), "decoder_input_ids": shifted}

    @override
    def generate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """What the model writes, and what it should write, as decoded texts.

        Raises:
            RuntimeError: If there is no tokenizer to decode with.
        """
        if self.tokenizer is None:
            raise RuntimeError(
                "SequenceToSequence has no tokenizer to decode texts with: set up the task's data first, or set "
                "`kind.tokenizer` where the data module is your own."
            )
        written = cast(GenerationMixin, model).generate(
            **super().inputs(model, batch),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
        )
        return self._texts(written), self._texts(batch[LABELS])

    def _texts(self, tokens: Any) -> list[str]:
        assert self.tokenizer is not None, "asked before"
        rows = (row[row != IGNORE_INDEX] for row in tokens)
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
