"""Columns of a table: what they must hold, and what takes their place."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features

from lightning_drm.kinds.kind import LABELS


def require_texts(table: Dataset, column: str, where: str) -> None:
    """Refuses a column that does not hold a text in every row.

    Args:
        table: The rows.
        column: The column.
        where: What the rows are, for messages: a data set's name in quotes, or a split's.

    Raises:
        ValueError: If it holds something else, or rows have none.
    """
    kind = table.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"Expected texts in column {column!r} of {where}, got {kind}.")
    num_missing = table[column][:].count(None)
    if num_missing:
        raise ValueError(
            f"Expected a text in every row, but {num_missing} of {len(table)} rows of {where} have none in column "
            f"{column!r}."
        )


def with_labels(table: Dataset, column: str, labels: Sequence[Any], feature: Any) -> Dataset:
    """A table with `labels` in the place of the column that they were made of.

    Args:
        table: The rows.
        column: The column that goes.
        labels: One entry per row.
        feature: Their type.
    """
    kept = table.remove_columns([column])
    return kept.add_column(LABELS, list(labels)).cast(Features({**kept.features, LABELS: feature}))
