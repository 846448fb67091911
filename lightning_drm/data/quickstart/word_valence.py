"""Words with a good or a bad ring: the lexicon of `vaderSentiment`, ten human ratings a word."""

import re
from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import word_family
from lightning_drm.pretrained import package_folder

PACKAGE = "vaderSentiment"


def read() -> Iterator[dict[str, str | int]]:
    """Yield the lexicon's words (not its smileys); words that look like one family share a group."""
    lexicon = package_folder(PACKAGE) / "vader_lexicon.txt"
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, mean_rating, *_ = line.split("\t")
        if re.fullmatch(r"[a-z]{3,}([ -][a-z]+)*", word):
            label = "positive" if float(mean_rating) > 0 else "negative"
            yield {"text": word, "label": label, "group": word_family(word)}
