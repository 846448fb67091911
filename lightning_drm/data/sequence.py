"""Tasks of one text written in answer to another."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import Encoder
from lightning_drm.data.tokenized import PadRight, TokenizedTask, pad_token
from lightning_drm.kinds import LABELS, SequenceToSequence


class SequenceTask(TokenizedTask):
    """Writes a text in answer to another one, with an encoder-decoder model such as T5.

    Batches are dicts of the tokenizer's fields for the inputs, and `labels`: the targets' tokens, padded with -100.
    What the model writes is compared with the targets as the tokenizer gives them back.

    Args:
        dataset: a hub name, a local folder or file, or a builder of `datasets` together with `data_files`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        input_column: the column with the text that the model reads.
        target_column: the column with the text that it should write.
        prefix: what to put before each input, such as `"summarize: "`.
        max_length: cut inputs to so many tokens; the tokenizer's own limit if left out.
        max_target_length: cut targets to so many tokens, those that scores are computed with too; not cut if left out.
        max_new_tokens: where the model stops to write when it is measured, if it has not ended the text before.
        num_beams: how many beginnings are kept while it writes; 1 takes the most likely token each time.
        **kwargs: see `DatasetTask`.

    Example::

        SequenceTask("news.csv", "t5-small", input_column="article", target_column="headline", prefix="summarize: ")

    """

    kind: SequenceToSequence

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        input_column: str = "text",
        target_column: str = "target",
        prefix: str = "",
        max_length: int | None = None,
        max_target_length: int | None = None,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset,
            pretrained,
            kind=SequenceToSequence(max_new_tokens, num_beams),
            label_column=target_column,
            **kwargs,
        )
        self.save_hyperparameters()
        if input_column == target_column:
            raise ValueError(f"Expected different columns for inputs and targets, got {input_column!r} for both.")
        self.input_column = input_column
        self.prefix = prefix
        self.max_length = max_length
        self.max_target_length = max_target_length

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` cached, and give the kind of task the tokenizer that it decodes with."""
        super().setup(stage)
        self.kind.tokenizer = self.tokenizer

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [self.input_column]

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return PadRight(pad_token(self.tokenizer))

    @cached_property
    @override
    def encoder(self) -> Encoder:
        return _Tokenize(self.tokenizer, self.input_column, self.prefix, self.max_length, self.max_target_length)


class _Tokenize:
    """Turns rows into tokens. `datasets` finds results in its cache by its hash: it holds no more."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        column: str,
        prefix: str,
        max_length: int | None,
        max_target_length: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.prefix = prefix
        self.max_length = max_length
        self.max_target_length = max_target_length
        self({column: ["a"], LABELS: ["a"]})  # the first call changes the tokenizer's state, and so its hash

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, Any]:
        inputs = [self.prefix + text for text in rows[self.column]]
        encoded = dict(self.tokenizer(inputs, truncation=True, max_length=self.max_length))
        cut = self.max_target_length is not None
        targets = self.tokenizer(text_target=rows[LABELS], truncation=cut, max_length=self.max_target_length)
        return {**encoded, LABELS: targets["input_ids"]}
