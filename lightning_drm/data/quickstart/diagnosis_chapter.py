"""Diagnoses by chapter of the International Classification of Diseases, from the package `simple_icd_10_cm`."""

from collections import defaultdict
from collections.abc import Iterator
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

    All diagnoses of one category (the first three characters of the code) share a group, and so do categories that are
    described with nearly the same words.
    """
    rows = {text: (chapter, category) for chapter, category, text in _diagnoses()}  # some codes repeat a description
    words_of_category: dict[str, str] = defaultdict(str)
    for text, (_, category) in rows.items():
        words_of_category[category] += f" {text}"
    groups = dict(zip(words_of_category, similar_groups(list(words_of_category.values())), strict=True))
    for text, (chapter, category) in rows.items():
        yield {"text": text, "label": CHAPTERS[chapter], "group": groups[category]}


def _diagnoses() -> Iterator[tuple[str, str, str]]:
    """The chapter, the category and the description of each diagnosis."""
    file = package_folder(PACKAGE) / "data" / "icd10c-tabular-April-1-2026.xml"
    for chapter in ElementTree.parse(file).iter("chapter"):
        number = chapter.findtext("name", "")
        for diagnosis in chapter.iter("diag") if number in CHAPTERS else ():
            code = diagnosis.findtext("name", "").replace(".", "")
            if len(code) <= 4:
                yield number, code[:3], diagnosis.findtext("desc", "")
