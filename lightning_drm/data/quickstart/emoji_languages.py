"""All languages in which an emoji has a name, from the package `emoji`: `bikini` is one in seven of the eight."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import xxhash

from lightning_drm.data.quickstart.emoji_language import PACKAGE, names_and_groups
from lightning_drm.kinds import MultiLabel

__all__ = ["KIND", "PACKAGE", "read"]

KIND = MultiLabel()

NUM_OF_ONE_LANGUAGE = 400
"""So many names that only one language has are taken of each, for the shared ones are few."""


def read() -> Iterator[dict[str, str | int | list[str]]]:
    """Yield the names with their languages, in groups as for `emoji_language`.

    A name that stands for emojis of different groups in different languages is left out.
    """
    languages: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, set[int]] = defaultdict(set)
    for (language, name), group in names_and_groups().items():
        languages[name].append(language)
        groups[name].add(group)
    taken: Counter[str] = Counter()
    for name in sorted(languages, key=lambda name: xxhash.xxh64_hexdigest(name.encode())):  # as good as random
        first, *others = languages[name]
        if len(groups[name]) > 1 or (not others and taken[first] == NUM_OF_ONE_LANGUAGE):
            continue
        if not others:
            taken[first] += 1
        yield {"text": name, "label": sorted(languages[name]), "group": min(groups[name])}
