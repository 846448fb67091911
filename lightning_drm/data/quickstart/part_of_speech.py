"""Words by part of speech: the lexicon of Eric Brill's tagger, as carried by the package `textblob`."""

import re
from collections import defaultdict
from collections.abc import Iterator

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
    lexicon = package_folder(PACKAGE) / "en" / "en-lexicon.txt"
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, _, tag = line.partition(" ")
        if tag in CLASSES and re.fullmatch(r"[a-z]{3,}", word):
            words[tag].append(word)
    for tag, label in CLASSES.items():
        for word in sorted(words[tag], key=_draw)[:NUM_PER_CLASS]:
            yield {"text": word, "label": label, "group": word_family(word)}


def _draw(word: str) -> str:
    """An order that is as good as random, and the same everywhere; the lexicon is sorted by the alphabet."""
    return xxhash.xxh64_hexdigest(word.encode())
