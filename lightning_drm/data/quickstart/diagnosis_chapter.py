"""Diagnoses by chapter of the International Classification of Diseases, from the package `simple_icd_10_cm`."""

from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from xml.etree import ElementTree

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.pretrained import package_folder

PACKAGE = "simple_icd_10_cm"
CHAPTERS = {
    "4": "endocrine",
    "6": "nervous",
    "9": "circulatory",
    "11": "digestive",
    "12": "skin",
    "13": "musculoskeletal",
    "14": "genitourinary",
    "17": "congenital",
}
"""Chapters of about the same size: diseases of seven systems of the body, and malformations of any of them."""


def read() -> Iterator[dict[str, str | int]]:
    """Yield the diagnoses with a code of three or four characters; longer codes mostly add the side of the body.

    All diagnoses of one category (the first three characters of the code) share a group. So do categories described
    with nearly the same words, and diagnoses that nearly repeat each other.
    """
    rows = {text: (chapter, category) for chapter, category, text in _diagnoses()}  # some codes repeat a description
    words_of_category: dict[str, str] = defaultdict(str)
    for text, (_, category) in rows.items():
        words_of_category[category] += f" {text}"
    numbers = similar_groups(list(words_of_category.values()), Fraction(1, 3))
    family_of = dict(zip(words_of_category, numbers, strict=True))
    groups = similar_groups(list(rows), Fraction(2, 3), families=[family_of[category] for _, category in rows.values()])
    for (text, (chapter, _)), group in zip(rows.items(), groups, strict=True):
        yield {"text": text, "label": CHAPTERS[chapter], "group": group}


def _diagnoses() -> Iterator[tuple[str, str, str]]:
    """The chapter, the category and the description of each diagnosis, without those that only refer to another one."""
    file = package_folder(PACKAGE) / "data" / "icd10c-tabular-April-1-2026.xml"
    for chapter in ElementTree.parse(file).iter("chapter"):
        number = chapter.findtext("name", "")
        for diagnosis in chapter.iter("diag") if number in CHAPTERS else ():
            code, text = diagnosis.findtext("name", "").replace(".", ""), diagnosis.findtext("desc", "")
            if len(code) <= 4 and "diseases classified elsewhere" not in text:
                yield number, code[:3], text
