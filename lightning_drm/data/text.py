"""Tasks whose input is one text per row, or a pair of texts."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import Encoder
from lightning_drm.data.template import TextTemplate
from lightning_drm.data.tokenized import TokenizedTask
from lightning_drm.kinds import require_texts


class TextTask(TokenizedTask):
    """Classifies texts, or pairs of texts.

    Batches are dicts of the tokenizer's fields, padded to the longest text in the batch, and `labels`.

    Args:
        dataset: a hub name, a local folder or file, or a builder of `datasets` together with `data_files`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        text_columns: the column with the text, or two columns for a pair. A text with columns in braces puts several
            together: `"{question} A: {choices[text][0]} B: {choices[text][1]}"`.
        max_length: cut texts to so many tokens; the tokenizer's own limit if left out.
        **kwargs: see `DatasetTask`.

    Example::

        TextTask("reviews.csv", "bert-base-uncased", text_columns="review", label_column="stars")

    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        text_columns: str | list[str] = "text",
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, pretrained, **kwargs)
        self.save_hyperparameters()
        self.text_columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"Expected one text column or a pair in text_columns, got {text_columns!r}.")
        self.templates = [TextTemplate(column) for column in self.text_columns]
        self.max_length = max_length

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return list(dict.fromkeys(column for template in self.templates for column in template.columns))

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return DataCollatorWithPadding(self.padding_tokenizer)

    @override
    def check(self, table: Dataset) -> None:
        for template in self.templates:
            if template.is_column:
                require_texts(table, template.template, repr(self.dataset))
            elif len(table):
                template.texts(table[:1])

    @cached_property
    @override
    def encoder(self) -> Encoder:
        return _Tokenize(self.tokenizer, self.text_columns, self.max_length)


class _Tokenize:
    """Turns rows into the tokenizer's fields. `datasets` finds results in its cache by its hash: it holds no more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: list[str], max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_length = max_length
        self._encoded([[""] for _ in columns])  # the first call changes the tokenizer's state, and so its hash

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, Any]:
        return self._encoded([TextTemplate(column).texts(rows) for column in self.columns])

    def _encoded(self, texts: list[list[str]]) -> dict[str, Any]:
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))
