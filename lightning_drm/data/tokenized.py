"""What tasks of texts have in common: a tokenizer, and batches of token sequences padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import DatasetTask
from lightning_drm.kinds import IGNORE_INDEX, LABELS, require_texts


class TokenizedTask(DatasetTask):
    """A task of texts.

    Args:
        dataset: see `DatasetTask`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        pad_token: which of the tokenizer's tokens fills up batches, where it has none for that, as Llama's.
        **kwargs: see `DatasetTask`.

    """

    def __init__(self, dataset: str, pretrained: str, *, pad_token: str | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, pretrained, **kwargs)
        self.pad_token = pad_token

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of `pretrained`."""
        return self.load_tokenizer()

    @property
    def padding_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, for batches that it fills up.

        Raises:
            ValueError: if it has no token for that.

        """
        if self.tokenizer.pad_token is None:
            raise ValueError(
                f"The tokenizer of {self.pretrained!r} has no token that fills up batches: name one of its tokens as "
                "pad_token."
            )
        return self.tokenizer

    @property
    def pad_token_id(self) -> int | None:
        """The number of the token that fills up batches."""
        number: int | None = self.tokenizer.pad_token_id
        return number

    def load_tokenizer(self, **options: Any) -> PreTrainedTokenizerBase:
        """The tokenizer of `pretrained`, with a token that fills up batches.

        Args:
            **options: arguments of `from_pretrained`.

        Raises:
            ValueError: if it has another token for that than `pad_token`, or does not know it.

        """
        found = AutoTokenizer.from_pretrained(**self._resolved, **options)
        if self.pad_token is None:
            return found
        if found.pad_token not in (None, self.pad_token):
            raise ValueError(
                f"The tokenizer of {self.pretrained!r} fills up batches with {found.pad_token!r}: leave out the "
                f"pad_token {self.pad_token!r}."
            )
        if self.pad_token not in found.get_vocab():
            raise ValueError(f"The tokenizer of {self.pretrained!r} has no token {self.pad_token!r} (pad_token).")
        found.pad_token = self.pad_token
        return found

    @override
    def check(self, table: Dataset) -> None:
        for column in self.input_columns:
            require_texts(table, column, repr(self.dataset))


@dataclass(frozen=True)
class PadRight:
    """Makes a batch of samples whose fields are token sequences, `labels` too.

    Models compute with positions that they count from the left, so what stands on the right changes no other token.

    Args:
        pad_token: Fills up `input_ids`; the attention mask hides it.

    Example:
        >>> batch = PadRight(9)([{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [3], "labels": [4, 5]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[1, 2], [3, 9]], [[1, -100], [4, 5]])
    """

    pad_token: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch; every field has the samples in the first dimension and tokens in the second."""
        filled = {"input_ids": self.pad_token, LABELS: IGNORE_INDEX}
        return {
            name: pad_sequence(
                [torch.tensor(sample[name], dtype=torch.long) for sample in samples],
                batch_first=True,
                padding_value=filled.get(name, 0),
            )
            for name in samples[0]
        }


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to fill up with; any token will do where a tokenizer has none, as Llama's."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
