"""Train, validation and test splits, made reproducibly where the data has none.

What is held out depends only on the rows, their order, the seed and scikit-learn's splitters, which may choose other
rows in another release. Every class keeps its share, and rows of one group (the copies of an article, the frames of a
video) stay on the same side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, DatasetDict
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from lightning_drm.kinds import LABELS

Strata = Callable[[Any], Any]
"""From the column `labels`, a class per row, of which every part of a split gets its share; None for any rows."""


def complete(
    splits: DatasetDict,
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    group_column: str | None = None,
    strata: Strata = np.asarray,
) -> DatasetDict:
    """Hold out from `train` the splits that are missing. Both fractions are of `train` as it came."""
    train = splits["train"]
    made: dict[str, Dataset] = {}
    left = 1.0
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if name not in splits:
            train, made[name] = hold_out(train, fraction / left, seed=seed, group_column=group_column, strata=strata)
            left -= fraction
    return DatasetDict({**splits, **made, "train": train})


def hold_out(
    table: Dataset, fraction: float, *, seed: int, group_column: str | None = None, strata: Strata = np.asarray
) -> tuple[Dataset, Dataset]:
    """Split a table in two: what stays, and what is held out.

    Args:
        table: the rows, with a column `labels`.
        fraction: how much to hold out. With groups it is rounded to 1 / k, as one fold of k is held out, and classes
            keep their shares as far as whole groups allow.
        seed: decides which rows.
        group_column: rows with the same value here stay together.
        strata: which rows are of one class.

    Raises:
        ValueError: if there are too few rows, or groups, for every class to be on both sides.

    """
    labels = strata(table[LABELS][:])
    try:
        if group_column is None:
            kept, held = train_test_split(range(len(table)), test_size=fraction, stratify=labels, random_state=seed)
        else:
            groups, num_folds = table[group_column][:], round(1 / fraction)
            if len(set(groups)) < num_folds:
                raise ValueError(f"{num_folds} groups are needed in {group_column!r}, there are {len(set(groups))}.")
            by_class = labels if labels is not None else np.zeros(len(groups), dtype=int)
            folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
            kept, held = next(folds.split(by_class, by_class, groups))
    except ValueError as error:
        raise ValueError(
            f"Expected enough rows and groups of every class to hold out {fraction:.0%}: {error}"
        ) from error
    return _rows(table, kept), _rows(table, held)


def limit(table: Dataset, num_samples: int | None, *, seed: int, strata: Strata = np.asarray) -> Dataset:
    """At most `num_samples` rows, the classes in proportion: at random, but evenly spaced in the order of classes."""
    if num_samples is None or len(table) <= num_samples:
        return table
    return _rows(table, evenly_spaced(len(table), num_samples, seed=seed, classes=strata(table[LABELS][:])))


def evenly_spaced(
    num_rows: int, num_samples: int, *, seed: int, classes: npt.ArrayLike | None
) -> npt.NDArray[np.int64]:
    """The numbers of some rows, classes in proportion.

    Args:
        num_rows: how many rows there are.
        num_samples: how many are wanted.
        seed: decides which.
        classes: the class of each row; None for any rows.

    """
    draws = np.random.RandomState(seed).random_sample(num_rows)  # NumPy keeps these, and not default_rng's, for good
    keys: tuple[Any, ...] = (draws,) if classes is None else (draws, classes)
    by_class = np.lexsort(keys)
    return np.sort(by_class[np.arange(num_samples) * num_rows // num_samples])


def _rows(table: Dataset, indices: npt.ArrayLike) -> Dataset:
    return table.select(np.sort(indices))
