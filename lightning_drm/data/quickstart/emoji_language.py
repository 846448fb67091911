"""The language of an emoji's name, from the package `emoji` (Unicode's CLDR short names)."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.pretrained import package_folder

PACKAGE = "emoji"
LANGUAGES = ("de", "en", "es", "fr", "id", "it", "pt", "tr")
"""Those written in Latin letters."""

_SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_NOT_MEANING = re.compile("[\ufe0f\u200d\u2640\u2642]")  # how it is drawn, joiners, female and male signs
_PEOPLE = re.compile("[\U0001f466-\U0001f469\U0001f9d1\U0001f9d2]+")  # boys, girls, men, women, persons, children


def read() -> Iterator[dict[str, str | int]]:
    """Yield every emoji's name in every language, skin tones left out, as they only add the tone's name.

    All names of an emoji share a group, whichever language, and so do its variants and emojis named with nearly the
    same words. A name that several languages share says nothing about the language and is left out.
    """
    groups = names_and_groups()
    num_languages = Counter(name for _, name in groups)
    for (language, name), group in groups.items():
        if num_languages[name] == 1:
            yield {"text": name, "label": language, "group": group}


def names_and_groups() -> dict[tuple[str, str], int]:
    """The group of every name, by language and name."""
    names = {(language, name): emoji_family(emoji) for language in LANGUAGES for emoji, name in _names(language)}
    words_of_family: dict[str, str] = defaultdict(str)
    for (_, name), family in names.items():
        words_of_family[family] += f" {name}"
    groups = dict(zip(words_of_family, similar_groups(list(words_of_family.values())), strict=True))
    return {key: groups[family] for key, family in names.items()}


def emoji_family(emoji: str) -> str:
    """The emoji without what makes variants of it: skin tone, who and how many the people are, style of drawing."""
    return _PEOPLE.sub("\U0001f9d1", _NOT_MEANING.sub("", _SKIN_TONE.sub("", emoji)))


def _names(language: str) -> Iterator[tuple[str, str]]:
    folder = package_folder(PACKAGE) / "unicode_codes"
    file = folder / ("emoji.json" if language == "en" else f"emoji_{language}.json")
    for emoji, entry in json.loads(file.read_text(encoding="utf-8")).items():
        if not _SKIN_TONE.search(emoji):
            name = entry["en"] if language == "en" else entry
            yield emoji, name.strip(":").replace("_", " ").lower()
