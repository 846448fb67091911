"""Texts that are made of several columns of a row."""

import re
import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from typing_extensions import override


class TextTemplate(string.Formatter):
    """A column's text, or a text with the values of columns in it, in the notation of `str.format`.

    `{column}` stands for a column's value, `{column[key]}` and `{column[0]}` for parts of a nested one.

    Args:
        template: a column's name, or a text with `{column}` in it.

    Example:
        >>> template = TextTemplate("{question} A: {choices[text][0]} B: {choices[text][1]}")
        >>> template.columns
        ['question', 'choices']
        >>> template.texts({"question": ["Which?"], "choices": [{"text": ["this", "that"]}]})
        ['Which? A: this B: that']
        >>> TextTemplate("review").texts({"review": ["good"]})
        ['good']

    """

    def __init__(self, template: str) -> None:
        self.template = template
        try:
            fields = [(name, spec, how) for _, name, spec, how in self.parse(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"Expected columns in braces in the text {template!r}: {error}.") from error
        if wrong := [name for name, spec, how in fields if spec or how or not re.fullmatch(_FIELD, name)]:
            raise ValueError(f"Expected {{column}} or {{column[key]}} in the text {template!r}, got {{{wrong[0]}}}.")
        self.fields = [name for name, _, _ in fields]

    @cached_property
    def columns(self) -> list[str]:
        """The columns that it reads, each once."""
        return list(dict.fromkeys(name.partition("[")[0] for name in self.fields)) or [self.template]

    @property
    def is_column(self) -> bool:
        """Whether it is a column as it stands."""
        return not self.fields

    def texts(self, rows: Mapping[str, Sequence[Any]]) -> list[str]:
        """One text per row.

        Args:
            rows: the columns.

        Raises:
            ValueError: if a row lacks a value that the template names.

        """
        if self.is_column:
            return list(rows[self.template])
        values = zip(*(rows[column] for column in self.columns), strict=True)
        return [self.vformat(self.template, (), dict(zip(self.columns, row, strict=True))) for row in values]

    @override
    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        try:
            value, key = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError):
            value, key = None, None
        if value is None:
            raise ValueError(f"Expected a value for {{{field_name}}} of {self.template!r} in {dict(kwargs)}.")
        return value, key


_FIELD = r"[^.\[\]!:{}0-9][^.\[\]!:{}]*(\[[^\[\]]+\])*"
