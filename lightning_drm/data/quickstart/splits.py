"""Train, validation and test splits that depend on the texts and the seed alone.

Random generators and the splitters built on them may draw something else in their next release, and a row more would
change every draw after it. Here a hash of what a group of rows says decides where the group goes.
"""

from collections import Counter, defaultdict

import xxhash
from datasets import Dataset, DatasetDict

from lightning_drm.kinds import LABELS

HELD_OUT = 10
"""One row in so many is held out for validation, and as many for test."""


def split_by_content(table: Dataset, seed: int, class_column: str | None = LABELS) -> DatasetDict:
    """Divide a table into train, validation and test, with whole groups and about the same share of every class.

    The groups are taken in the order of their hashes. Each goes to the first of test and validation that holds, with
    it, no more than a tenth of any class; otherwise it goes to train.

    Args:
        table: the rows, with the columns `text` and `group`.
        seed: is hashed together with the texts.
        class_column: the column with the classes; none where any rows will do.

    """
    texts, labels = table["text"][:], [0] * len(table) if class_column is None else table[class_column][:]
    members: dict[int | str, list[int]] = defaultdict(list)
    for row, group in enumerate(table["group"]):
        members[group].append(row)
    quota = {label: count // HELD_OUT for label, count in Counter(labels).items()}
    held: dict[str, Counter[int | str]] = {"test": Counter(), "validation": Counter()}
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for group in sorted(members.values(), key=lambda group: _hash([texts[row] for row in group], seed)):
        counts = Counter(labels[row] for row in group)
        fits = (name for name in held if all(held[name][label] + counts[label] <= quota[label] for label in counts))
        name = next(fits, "train")
        rows[name] += group
        if name in held:
            held[name] += counts
    return DatasetDict({name: table.select(sorted(chosen)) for name, chosen in rows.items()})


def _hash(texts: list[str], seed: int) -> str:
    return xxhash.xxh128_hexdigest("\0".join([str(seed), *sorted(texts)]).encode())
