"""Texts that are copies of each other, or nearly."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer


def similar_groups(texts: Sequence[str]) -> list[int]:
    """Number the texts so that two share a number if they are alike, or both like a third.

    Two texts are alike if the words that they share weigh at least a third of all words in either. A word weighs the
    more the fewer texts have it: 1 + ⌊log₂(number of texts / number of texts with the word)⌋. All of this is computed
    in integers, so that no rounding decides whether two texts are alike, and every machine finds the same groups.

    Args:
        texts: the texts.

    Returns:
        One number per text. Only which of them are equal means anything.

    """
    has_word = csr_array(CountVectorizer(token_pattern=r"\w+", binary=True, dtype=np.int64).fit_transform(texts))
    num_texts_with = has_word.sum(axis=0)
    weights = np.array([int(len(texts) // count).bit_length() for count in num_texts_with])
    shared = ((has_word * weights) @ has_word.T).tocoo()
    weight = (has_word * weights).sum(axis=1)
    alike = 3 * shared.data >= weight[shared.row] + weight[shared.col] - shared.data
    pairs = (np.ones(alike.sum(), dtype=np.int8), (shared.row[alike], shared.col[alike]))
    _, groups = connected_components(csr_array(pairs, shape=shared.shape), directed=False)
    return [int(group) for group in groups]
