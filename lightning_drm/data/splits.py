"""Train, validation and test splits, made reproducibly where the data has none.

What is held out depends on the rows, their order and the seed only. Every class keeps its share, and rows of one group
(the copies of an article, the frames of a video) stay on the same side.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, DatasetDict
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from lightning_drm.data.labels import LABELS


def hold_out(
    table: Dataset, size: float | int, *, seed: int, group_column: str | None = None
) -> tuple[Dataset, Dataset]:
    """Split a table in two: what stays, and what is held out.

    Args:
        table: the rows, with a column `labels`.
        size: what to hold out: a fraction of the rows, or a number of rows (without groups only). With groups the
            fraction is rounded to 1 / k, as one fold of k is held out, and classes keep their shares as far as whole
            groups allow.
        seed: decides which rows.
        group_column: rows with the same value here stay together.

    """
    labels = table[LABELS][:]
    if group_column is None:
        kept, held = train_test_split(range(len(table)), test_size=size, stratify=labels, random_state=seed)
    else:
        folds = StratifiedGroupKFold(round(1 / size), shuffle=True, random_state=seed)
        kept, held = next(folds.split(labels, labels, table[group_column][:]))
    return _rows(table, kept), _rows(table, held)


def complete(
    splits: DatasetDict, *, validation_fraction: float, test_fraction: float, seed: int, group_column: str | None = None
) -> DatasetDict:
    """Hold out from `train` the splits that are missing. Both fractions are of `train` as it came."""
    train = splits["train"]
    made: dict[str, Dataset] = {}
    left = 1.0
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if name not in splits:
            train, made[name] = hold_out(train, fraction / left, seed=seed, group_column=group_column)
            left -= fraction
    return DatasetDict({**splits, **made, "train": train})


def limit(table: Dataset, num_samples: int | None, *, seed: int) -> Dataset:
    """At most `num_samples` rows, with the classes in their proportions."""
    if num_samples is None or len(table) <= num_samples:
        return table
    return hold_out(table, num_samples, seed=seed)[1]


def _rows(table: Dataset, indices: Sequence[int]) -> Dataset:
    return table.select(np.sort(indices))
