"""Questions with several answers to choose from."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import Encoder
from lightning_drm.data.tokenized import TokenizedTask
from lightning_drm.kinds import LABELS, Choice, Kind, require_texts
from lightning_drm.kinds.choice import CHOICES


class MultipleChoiceTask(TokenizedTask):
    """Chooses the right one of several answers to a question.

    Batches are dicts of the tokenizer's fields, of shape `(batch, choices, tokens)` and padded to the longest text in
    the batch, and `labels`, the numbers of the right choices. Every row has the same number of choices.

    Args:
        dataset: a hub name, a local folder or file, or a builder of `datasets` together with `data_files`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        question_columns: the column with the question or premise. The second one of two stands before each choice, as
            the beginning of a sentence that the choices end.
        choice_columns: the column with a list of choices, or several columns with one choice each.
        max_length: cut each question with its choice to so many tokens; the tokenizer's own limit if left out.
        kind: `Choice`, or a subclass of yours.
        **kwargs: see `DatasetTask`. The labels are numbers from 0 on, letters from A on, or the right choice's text.

    Example::

        MultipleChoiceTask("exam.jsonl", "bert-base-uncased", "question", ["a", "b", "c"], label_column="answer")

    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        question_columns: str | list[str] = "question",
        choice_columns: str | list[str] = CHOICES,
        max_length: int | None = None,
        kind: Kind | None = None,
        **kwargs: Any,
    ) -> None:
        if kind is not None and not isinstance(kind, Choice):
            raise ValueError(f"{type(self).__name__} is for tasks of the kind Choice, got {type(kind).__name__}.")
        super().__init__(dataset, pretrained, kind=kind or Choice(), **kwargs)
        self.save_hyperparameters()
        self.question_columns = [question_columns] if isinstance(question_columns, str) else list(question_columns)
        self.choice_columns = [choice_columns] if isinstance(choice_columns, str) else list(choice_columns)
        if len(self.question_columns) not in (1, 2):
            raise ValueError(f"Expected one column or two in question_columns, got {question_columns!r}.")
        if not self.choice_columns:
            raise ValueError("Expected one column or more in choice_columns, got none.")
        self.max_length = max_length

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [*self.question_columns, CHOICES]

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return _PadChoices(self.padding_tokenizer)

    @cached_property
    @override
    def encoder(self) -> Encoder:
        return _TokenizeChoices(self.tokenizer, self.question_columns, self.max_length)

    @override
    def load(self) -> DatasetDict:
        """Reads the splits, and makes one column of the choices."""
        splits = super().load()
        for name, table in splits.items():
            self._require_columns(name, table, [*self.question_columns, *self.choice_columns])
            if self.choice_columns == [CHOICES]:
                continue
            columns = [table[column][:] for column in self.choice_columns]
            if len(columns) > 1:
                for column in self.choice_columns:
                    require_texts(table, column, repr(self.dataset))
            choices = [list(row) for row in zip(*columns, strict=True)] if len(columns) > 1 else columns[0]
            others = [column for column in table.column_names if column != CHOICES]
            splits[name] = table.select_columns(others).add_column(CHOICES, choices)
        return splits

    @override
    def check(self, table: Dataset) -> None:
        for column in self.question_columns:
            require_texts(table, column, repr(self.dataset))
        kind = table.features[CHOICES]
        if getattr(getattr(kind, "feature", None), "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"Expected a list of texts in every row of column {self.choice_columns[0]!r} of {self.dataset!r}, got "
                f"{kind}; for choices in columns of their own, name them all in choice_columns."
            )
        for number, row in enumerate(table[CHOICES][:]):
            if row is None or None in row:
                raise ValueError(f"Expected texts as choices, got {row} in row {number} of {self.dataset!r}.")


class _TokenizeChoices:
    """Turns rows into fields with one entry per choice. `datasets` finds results by its hash: it holds no more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, questions: list[str], max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.questions = questions
        self.max_length = max_length
        self({**{column: [""] for column in questions}, CHOICES: [[""]]})  # changes the tokenizer's state and its hash

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        first, *beginnings = (rows[column] for column in self.questions)
        questions, answers = [], []
        for row, choices in enumerate(rows[CHOICES]):
            questions += [first[row]] * len(choices)
            answers += [" ".join([*(column[row] for column in beginnings), choice]) for choice in choices]
        fields = self.tokenizer(questions, answers, truncation=True, max_length=self.max_length)
        ends = torch.tensor([len(choices) for choices in rows[CHOICES]]).cumsum(0).tolist()
        parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        return {name: [values[part] for part in parts] for name, values in fields.items()}


class _PadChoices:
    """Makes a batch: all choices of all rows padded together, then ordered by row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([int(row[LABELS]) for row in rows])
        names = [name for name in rows[0] if name != LABELS]
        flat = [
            dict(zip(names, choice, strict=True))
            for row in rows
            for choice in zip(*(row[name] for name in names), strict=True)
        ]
        fields = self.tokenizer.pad(flat, return_tensors="pt")
        return {**{name: tensor.unflatten(0, (len(rows), -1)) for name, tensor in fields.items()}, LABELS: labels}
