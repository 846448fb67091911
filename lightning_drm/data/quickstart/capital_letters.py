"""Which words of a sentence have a capital letter, names mostly: BBC news articles, as their editors wrote them.

The words are given in lower case. The tags come from the article itself: a run of words with capital letters is
`B-capital`, `I-capital`, …, all else is `O`. Where a capital letter says nothing, there is none to find: sentences are
given without their first word, and *I* is `O`.
"""

import re
from collections.abc import Iterator

import xxhash

from lightning_drm.data.quickstart.news_topic import PACKAGE, articles
from lightning_drm.kinds import Tokens

__all__ = ["KIND", "PACKAGE", "read"]

KIND = Tokens()

NUM_PER_ARTICLE = 2
NUM_WORDS = range(6, 25)

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+")
_WORD = re.compile(r"\w+(?:['-]\w+|[.,]\d+)*|[^\w\s]")


def read() -> Iterator[dict[str, str | int | list[str]]]:
    """Yield some sentences of each article, with its group; one that several articles share is given once."""
    seen: set[str] = set()
    for _, text, group in articles():
        _title, *paragraphs = text.splitlines()
        sentences = [_WORD.findall(part)[1:] for line in paragraphs for part in _SENTENCE_END.split(line)]
        fitting = [words for words in sentences if len(words) in NUM_WORDS and " ".join(words).lower() not in seen]
        for words in sorted(fitting, key=_draw)[:NUM_PER_ARTICLE]:
            lowered = [word.lower() for word in words]
            seen.add(" ".join(lowered))
            yield {"text": " ".join(lowered), "tokens": lowered, "label": _tags(words), "group": group}


def _tags(words: list[str]) -> list[str]:
    """One tag for each word.

    Example:
        >>> _tags(["did", "I", "see", "Tony", "Blair", "?"])
        ['O', 'O', 'O', 'B-capital', 'I-capital', 'O']
    """
    capital = [word[0].isupper() and not re.match(r"I\b", word) for word in words]
    before = [False, *capital]
    return [("I-capital" if b else "B-capital") if c else "O" for c, b in zip(capital, before, strict=False)]


def _draw(words: list[str]) -> str:
    """An order that is as good as random, and the same everywhere."""
    return xxhash.xxh64_hexdigest(" ".join(words).encode())
