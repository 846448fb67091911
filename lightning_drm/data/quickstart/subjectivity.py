"""Whether a sense of a word is a matter of opinion: the subjectivity lexicon of `pattern`, carried by `textblob`."""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import joined_groups, word_family
from lightning_drm.pretrained import package_folder

PACKAGE = "textblob"


def read() -> Iterator[dict[str, str | int]]:
    """Yield each word with the sense that is meant, and whether that is more subjective than objective.

    Senses that are defined by the same words share a group, and so do all senses of the words of one family. Senses
    that the lexicon lists with different labels are left out.
    """
    labels: dict[tuple[str, str], set[str]] = defaultdict(set)
    lexicon = package_folder(PACKAGE) / "en" / "en-sentiment.xml"
    for entry in ElementTree.parse(lexicon).getroot():
        label = "subjective" if float(entry.attrib["subjectivity"]) > 0.5 else "objective"
        if sense := entry.attrib.get("sense"):
            labels[entry.attrib["form"].replace("_", " "), sense].add(label)
    rows = [(word, sense, *found) for (word, sense), found in labels.items() if len(found) == 1]
    groups = joined_groups([(word_family(word), sense) for word, sense, _ in rows])
    for (word, sense, label), group in zip(rows, groups, strict=True):
        yield {"text": f"{word}: {sense}", "label": label, "group": group}
