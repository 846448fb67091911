"""Words by part of speech: the lexicon of Eric Brill's tagger, as carried by the package `textblob`."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import xxhash

from lightning_drm.data.quickstart.similar import word_family
from lightning_drm.pretrained import package_folder

PACKAGE = "textblob"
CLASSES = {"NN": "noun", "JJ": "adjective", "VB": "verb", "RB": "adverb"}
"""Penn Treebank tags of words that are not inflected: their endings would tell the class."""

NUM_PER_CLASS = 1800


def read() -> Iterator[dict[str, str]]:
    """Yield as many words of each class, each with the class it most often has; words of one family share a group."""
    words: dict[str, list[str]] = defaultdict(list)
    for word, tag in lexicon():
        if tag in CLASSES and re.fullmatch(r"[a-z]{3,}", word):
            words[tag].append(word)
    for tag, label in CLASSES.items():
        for word in first_by_hash(words[tag], NUM_PER_CLASS):
            yield {"text": word, "label": label, "group": word_family(word)}


def lexicon() -> Iterator[tuple[str, str]]:
    """Yield the lexicon's words, each with the tag that it has most often."""
    file = package_folder(PACKAGE) / "en" / "en-lexicon.txt"
    for line in file.read_text(encoding="utf-8").splitlines():
        word, _, tag = line.partition(" ")
        yield word, tag


def first_by_hash(texts: Iterable[str], number: int) -> list[str]:
    """Some of the texts, in an order that is as good as random, and the same everywhere."""
    return sorted(texts, key=lambda text: xxhash.xxh64_hexdigest(text.encode()))[:number]
