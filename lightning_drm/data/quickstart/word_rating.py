"""How good or bad a word's ring is, as a number: the mean of the ten ratings in the lexicon of `vaderSentiment`."""

from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import word_family
from lightning_drm.data.quickstart.word_valence import PACKAGE, ratings
from lightning_drm.kinds import Regression

__all__ = ["KIND", "PACKAGE", "read"]

KIND = Regression()


def read() -> Iterator[dict[str, str | float]]:
    """Yield the lexicon's words with their mean ratings; words that look like one family share a group."""
    for word, rating in ratings():
        yield {"text": word, "label": rating, "group": word_family(word)}
