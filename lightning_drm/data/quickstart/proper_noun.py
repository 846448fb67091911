"""Names and common nouns, in small letters: the lexicon of Eric Brill's tagger, carried by the package `textblob`."""

import re
from collections import defaultdict
from collections.abc import Iterator

from lightning_drm.data.quickstart.part_of_speech import PACKAGE, first_by_hash, lexicon
from lightning_drm.data.quickstart.similar import word_family

__all__ = ["PACKAGE", "read"]

CLASSES = {"NN": "noun", "NNP": "name"}
"""Penn Treebank tags."""

NUM_PER_CLASS = 2500


def read() -> Iterator[dict[str, str]]:
    """Yield as many nouns as names, without those that are both; words of one family share a group."""
    tags: dict[str, set[str]] = defaultdict(set)
    for word, tag in lexicon():
        if re.fullmatch(r"[A-Za-z]{3,}", word):
            tags[word.lower()].add(tag)
    for tag, label in CLASSES.items():
        for word in first_by_hash((word for word, found in tags.items() if found == {tag}), NUM_PER_CLASS):
            yield {"text": word, "label": label, "group": word_family(word)}
