"""What the site changes in docstrings: formulas become MathML, which browsers draw by themselves."""

import logging
import re
from textwrap import indent
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

logger = logging.getLogger("mkdocs.plugins.docstrings")  # whose warnings fail a strict build
BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *(?=\n\1 +\S)))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
LEFT = re.compile(r":math:|\.\. math::|<merror")
LIST_INDENT = 4  # what Markdown asks of a paragraph in a list; docstrings have three


class Docstrings(Extension):
    """Rewrites each docstring from the conventions of the code to those of Markdown."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrites the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
            if LEFT.search(obj.docstring.value):
                logger.warning("%s: a formula of its docstring cannot be shown.", obj.path)


def as_markdown(text: str) -> str:
    """A docstring with its formulas in MathML, and its example under a title that the site's parser knows."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^Example::$", "For example:", text, flags=re.MULTILINE)
    text = BLOCK.sub(_block, text)
    # In a span, as Markdown takes a formula at a line's beginning for a paragraph of its own.
    return INLINE.sub(lambda found: f"<span>{_mathml(found[1], 'inline')}</span>", text)


def _block(found: re.Match[str]) -> str:
    spaces = -(-len(found[1]) // LIST_INDENT) * LIST_INDENT
    return indent(_mathml(found[2], "block"), " " * spaces)


def _mathml(formula: str, display: str) -> str:
    return convert(" ".join(formula.split()), display=display)
