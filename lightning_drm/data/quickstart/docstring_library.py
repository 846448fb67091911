"""Which library a docstring comes from, told by what it says: the libraries that this package needs anyway."""

import ast
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import xxhash

from lightning_drm.data.quickstart.similar import similar_groups
from lightning_drm.pretrained import package_folder

LIBRARIES = {
    "numpy": "numpy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
    "torch": "torch",
    "transformers": "transformers",
}
"""Distribution and import name."""

DISTRIBUTIONS = tuple(LIBRARIES)
NUM_PER_LIBRARY = 600
NUM_WORDS = 60
"""Of a docstring's start: more than the model reads, so that what looks alike to the model is found to be alike."""

_SAYS_ITS_LIBRARY = re.compile(r"torch|numpy|\bnp\.|pandas|\bpd\.|sklearn|scikit|transformers\b|hugging", re.IGNORECASE)


def read() -> Iterator[dict[str, str | int]]:
    """Yield as many docstrings from each library, its own name taken out of them; near-copies share a group."""
    found: dict[str, str] = {}
    for library, package in LIBRARIES.items():
        fresh = (text for text in _docstrings(package_folder(package)) if text not in found)
        for text in islice(fresh, NUM_PER_LIBRARY):
            found[text] = library
    for (text, library), group in zip(found.items(), similar_groups(list(found)), strict=True):
        yield {"text": text, "label": library, "group": group}


def _docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of a package's files, read without importing them, in an order that is the same everywhere."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    for name in sorted(files, key=lambda name: xxhash.xxh64_hexdigest(name.encode())):
        if "test" not in name:
            yield from filter(None, map(_start, _docstrings_in(files[name])))


def _docstrings_in(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    definitions: list[ast.AST] = [tree]
    for parent in definitions:  # grows as it goes: classes in classes, but nothing inside functions
        for node in getattr(parent, "body", []):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef | ast.If | ast.Try):
                definitions.append(node)


def _start(docstring: str) -> str:
    """The first words, without examples and words that name the library; nothing if few words are left."""
    prose = docstring.partition(">>>")[0].split()[: 2 * NUM_WORDS]
    words = [word for word in prose if not _SAYS_ITS_LIBRARY.search(word)][:NUM_WORDS]
    return " ".join(words) if len(words) >= 8 else ""
