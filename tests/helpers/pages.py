"""Pages of documentation as what can be run: their blocks of code, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: What stands behind its fence.
        title: The file that it is, if it is one.
        text: The code.
    """

    language: str
    title: str | None
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in some languages, with what the page includes from other files."""
    text = INCLUDED.sub(lambda found: (ROOT / found[1]).read_text().rstrip("\n"), page.read_text())
    found = (Block(language, title or None, code) for language, title, code in FENCED.findall(text))
    return [block for block in found if block.language in languages]


def commands(shell: str) -> list[list[str]]:
    """The words after ``lightning-drm`` of each command in a block that calls it, whatever starts it."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        for is_joint, group in groupby(shlex.split(line, comments=True), lambda word: word == "&&"):
            words = list(group)
            name = next((word for word in ("lightning-drm", "lightning_drm") if word in words), None)
            if not is_joint and name is not None:
                found.append(words[words.index(name) + 1 :])
    return found


def named_files(page: Path) -> set[str]:
    """The configurations and examples that a page names."""
    return set(re.findall(r"\b(?:configs|examples)/[\w/]+\.(?:yaml|py|sh|sbatch|md)", page.read_text()))
