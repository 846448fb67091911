"""Words with a good or a bad ring: the lexicon of `vaderSentiment`, ten human ratings a word."""

import re
from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import word_family
from lightning_drm.pretrained import package_folder

PACKAGE = "vaderSentiment"


def read() -> Iterator[dict[str, str]]:
    """Yield the lexicon's words (not its smileys); words that look like one family share a group."""
    for word, rating in ratings():
        yield {"text": word, "label": "positive" if rating > 0 else "negative", "group": word_family(word)}


def ratings() -> Iterator[tuple[str, float]]:
    """Yield the lexicon's words and the mean of each one's ratings, which go from -4 to 4."""
    lexicon = package_folder(PACKAGE) / "vader_lexicon.txt"
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, mean_rating, *_ = line.split("\t")
        if re.fullmatch(r"[a-z]{3,}([ -][a-z]+)*", word):
            yield word, float(mean_rating)
