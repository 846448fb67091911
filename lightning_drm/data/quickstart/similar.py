"""Texts that are copies of each other, or nearly, and words that belong together."""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer


def similar_groups(texts: Sequence[str], similarity: Fraction = Fraction(1, 3)) -> list[int]:
    """Number the texts so that two share a number if they are alike, or both like a third.

    How similar two texts are is what the words that they share weigh, divided by what all words of either weigh. A word
    weighs the more the fewer texts have it: 1 + ⌊log₂(number of texts / number of texts with the word)⌋. All of this is
    integers, so no rounding decides whether two texts are alike, and every machine finds the same groups.

    Args:
        texts: the texts.
        similarity: two texts are alike from this similarity on.

    Returns:
        One number per text. They only tell which texts are in one group.

    """
    has_word = csr_array(CountVectorizer(token_pattern=r"\w+", binary=True, dtype=np.int64).fit_transform(texts))
    weights = np.array([(len(texts) // int(count)).bit_length() for count in has_word.sum(axis=0)])
    weight = (has_word * weights).sum(axis=1)
    shared = ((has_word * weights) @ has_word.T).tocoo()
    either = weight[shared.row] + weight[shared.col] - shared.data
    alike = similarity.denominator * shared.data >= similarity.numerator * either
    return _components(shared.row[alike], shared.col[alike], len(texts))


def joined_groups(keys: Sequence[Sequence[str]]) -> list[int]:
    """Number rows so that two share a number if they have a key in common, or both have one in common with a third.

    Args:
        keys: each row's keys; a key at one place is never the same as one at another place.

    Example:
        >>> joined_groups([("love", "a"), ("hate", "b"), ("love", "b"), ("like", "c")])
        [0, 0, 0, 1]
    """
    numbers: dict[tuple[int, str], int] = {}
    pairs = [
        (row, len(keys) + numbers.setdefault(place, len(numbers)))
        for row, own in enumerate(keys)
        for place in enumerate(own)
    ]
    rows, found = np.array(pairs).T
    return _components(rows, found, len(keys) + len(numbers))[: len(keys)]


def _components(ones: npt.NDArray[np.integer], others: npt.NDArray[np.integer], number: int) -> list[int]:
    pairs = csr_array((np.ones(len(ones)), (ones, others)), shape=(number, number))
    _, groups = connected_components(pairs, directed=False)
    return [int(group) for group in groups]


def word_family(word: str) -> str:
    """The start that `love`, `loved`, `loving` and `lovable` share: four letters, without a vowel at their end."""
    return re.sub(r"[aeiouy]$", "", word[:4])
