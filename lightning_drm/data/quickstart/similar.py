"""Texts that are copies of each other, or nearly."""

from collections.abc import Sequence

from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import radius_neighbors_graph


def similar_groups(texts: Sequence[str], similarity: float = 0.5) -> list[int]:
    """Number the texts so that two share a number if they are alike, or both like a third.

    Args:
        texts: the texts.
        similarity: two texts are alike from this cosine similarity of their TF-IDF word vectors on.

    """
    vectors = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts)
    alike = radius_neighbors_graph(vectors, 1 - similarity, metric="cosine")
    _, groups = connected_components(alike, directed=False)
    return [int(group) for group in groups]
