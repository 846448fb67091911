"""Texts whose words bear tags."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import Encoder
from lightning_drm.data.tokenized import TokenizedTask
from lightning_drm.kinds import IGNORE_INDEX, LABELS, Kind, Tokens


class TokenTask(TokenizedTask):
    """Tags the words of texts.

    A row has a list of words and a list of as many tags. Batches are dicts of the tokenizer's fields and `labels`, a
    tag for the first token of each word and -100 for all other tokens, padded to the longest text in the batch. A word
    beyond `max_length`, or one that the tokenizer makes no token of, loses its tag, in evaluation too.

    Splits that are missing are held out at random: tags do not keep their shares exactly.

    Args:
        dataset: a local folder or file (json, parquet), a hub name, or a builder of `datasets` with `data_files`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        words_column: the column with the lists of words.
        label_column: the column with the lists of tags: strings, integers, or classes that the data names.
        max_length: cut texts to so many tokens; the tokenizer's own limit if left out.
        kind: `Tokens`, or a subclass of yours.
        **kwargs: see `DatasetTask`.

    Example::

        TokenTask("entities.jsonl", "bert-base-uncased", words_column="tokens", label_column="ner_tags")

    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        words_column: str = "tokens",
        label_column: str = "tags",
        max_length: int | None = None,
        kind: Kind | None = None,
        **kwargs: Any,
    ) -> None:
        if kind is not None and not isinstance(kind, Tokens):
            raise ValueError(f"{type(self).__name__} is for tasks of the kind Tokens, got {type(kind).__name__}.")
        super().__init__(dataset, pretrained, kind=kind or Tokens(), label_column=label_column, **kwargs)
        self.save_hyperparameters()
        self.words_column = words_column
        self.max_length = max_length

    @cached_property
    @override
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of `pretrained`."""
        found = self.load_tokenizer()
        if getattr(found, "add_prefix_space", None) is False:  # byte-level ones take words only with a space before
            found = self.load_tokenizer(add_prefix_space=True)
        if not found.is_fast:
            raise ValueError(
                f"Tags need a fast tokenizer, which knows the word of each token, and that of {self.pretrained!r} is "
                f"a {type(found).__name__}."
            )
        return found

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [self.words_column]

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return DataCollatorForTokenClassification(self.padding_tokenizer, label_pad_token_id=IGNORE_INDEX)

    @cached_property
    @override
    def encoder(self) -> Encoder:
        return _TokenizeWords(self.tokenizer, self.words_column, self.max_length)

    @override
    def check(self, table: Dataset) -> None:
        kind, where = table.features[self.words_column], f"of {self.dataset!r}"
        if table.split is not None:
            where = f"of the split {str(table.split)!r} {where}"
        if getattr(getattr(kind, "feature", None), "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"Expected a list of words in every row of column {self.words_column!r}, got {kind}.")
        rows = zip(table[self.words_column][:], table[self.label_column][:], strict=True)
        for number, (words, tags) in enumerate(rows):
            if not words or not all(word and not word.isspace() for word in words):
                raise ValueError(
                    f"Expected words in every row, got {words!r} in row {number} {where}, column {self.words_column!r}."
                )
            if isinstance(tags, list) and len(tags) != len(words):
                raise ValueError(
                    f"Expected as many tags as words, got {len(words)} words in {self.words_column!r} and {len(tags)} "
                    f"tags in {self.label_column!r}, in row {number} {where}."
                )


class _TokenizeWords:
    """Turns rows into the tokenizer's fields and labels. `datasets` finds results by its hash: it holds no more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, column: str, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.max_length = max_length
        self({column: [["a"]], LABELS: [[0]]})  # the first call changes the tokenizer's state, and so its hash

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        fields = self.tokenizer(
            rows[self.column], is_split_into_words=True, truncation=True, max_length=self.max_length
        )
        labels = []
        for number, tags in enumerate(rows[LABELS]):
            words = fields.word_ids(number)
            starts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels.append([tags[w] if is_first else IGNORE_INDEX for w, is_first in zip(words, starts, strict=True)])
        return {**fields, LABELS: labels}
