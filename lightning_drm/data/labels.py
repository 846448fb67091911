"""From a column of labels, as found, to class numbers that every split agrees on."""

from datasets import ClassLabel, DatasetDict, Value

LABELS = "labels"
"""The column that holds the class numbers, named as transformers' models expect it."""


def encode_labels(splits: DatasetDict, column: str) -> DatasetDict:
    """Rename the label column to `labels` and make it a `ClassLabel`, with the same classes in every split.

    Classes that the data names itself keep their order; others are sorted by value, so that 10 comes after 9.

    Raises:
        ValueError: if a label is missing or is neither a string, an integer nor a boolean.

    """
    feature = next(iter(splits.values())).features[column]
    if not isinstance(feature, ClassLabel):
        splits = _with_class_label(splits, column)
    for name, table in splits.items():
        num_missing = sum(label is None or label < 0 for label in table[column])
        if num_missing:
            raise ValueError(
                f"Expected a label in every row, but {num_missing} of the {len(table)} rows of the split {name!r} have "
                f"none in column {column!r}: use another split or leave those rows out."
            )
    return splits if column == LABELS else splits.rename_column(column, LABELS)


def _with_class_label(splits: DatasetDict, column: str) -> DatasetDict:
    dtype = {name: getattr(table.features[column], "dtype", "nested") for name, table in splits.items()}
    for name, kind in dtype.items():
        if not kind.startswith(("int", "uint", "bool", "string", "large_string")):
            raise ValueError(
                f"Expected strings, integers or booleans in label column {column!r}, got {kind} in {name!r}."
            )
    if len(set(dtype.values())) > 1:
        raise ValueError(f"Expected one type of label in every split, got {dtype} in column {column!r}.")
    values = {value for table in splits.values() for value in table.unique(column)} - {None}
    names = [str(value).lower() if isinstance(value, bool) else str(value) for value in sorted(values)]  # as Arrow does
    return splits.cast_column(column, Value("string")).cast_column(column, ClassLabel(names=names))
