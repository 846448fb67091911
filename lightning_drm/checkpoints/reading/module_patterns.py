r"""Which entry of an adapter's ``rank_pattern`` or ``alpha_pattern`` applies to a module, as peft decides it.

peft's rule is ``re.match(rf"(.*\.)?({key})$", module)``, and the first key that matches counts. A key may be any
regular expression, one that takes forever on some names among them, and Python's ``re`` cannot be stopped. So keys that
spell out a name, which are nearly all, are compared as text. The others are matched by the package ``regex``, which
reads the same syntax and takes a limit of time; to find out which expressions are slow by looking at them would refuse
sound ones, such as ``.*layers.*attn.*q_proj``, or let slow ones pass.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

_SPELLED_OUT = re.compile(r"(\^?)((?:[\w-]|\\[.-])+)")
_LONGEST = 1000  # no module has a longer name, and compiling takes time, too
_SECONDS = 2.0  # for all modules and keys of one adapter


def matched_keys(patterns: Mapping[str, Any], modules: Iterable[str], field: str) -> dict[str, str]:
    r"""By module, the first key that matches it; modules that none matches are left out.

    Args:
        patterns: The field's value.
        modules: Names of modules.
        field: Its name, for messages.

    Raises:
        ValueError: If a key is not a regular expression, or takes too long to match.

    Example:
        >>> matched_keys({"q": 4, r"layers\.[01]\..*": 8}, ["layers.1.k", "layers.1.q"], "rank_pattern")
        {'layers.1.k': 'layers\\.[01]\\..*', 'layers.1.q': 'q'}
    """
    end = time.monotonic() + _SECONDS
    rules = [(key, _rule(key, field)) for key in patterns]
    found = {}
    for module in modules:
        for key, matches in rules:
            try:
                if matches(module, end - time.monotonic()):
                    found[module] = key
                    break
            except TimeoutError as error:
                raise ValueError(f"the pattern {_cut(key)} in {field} takes too long to match {module}") from error
    return found


def _rule(key: str, field: str) -> Callable[[str, float], bool]:
    """Whether a module matches a key, given also the seconds that are left."""
    spelled = _SPELLED_OUT.fullmatch(key)
    if spelled is not None:
        anchor, name = spelled[1], spelled[2].replace("\\", "")
        tail = f".{name}"
        return lambda module, seconds: module == name or (not anchor and module.endswith(tail))
    if len(key) > _LONGEST:
        raise ValueError(f"the pattern {_cut(key)} in {field} is longer than {_LONGEST:,} characters")
    try:
        re.compile(rf"(.*\.)?({key})$")  # what peft takes; `regex` takes more
        compiled = regex.compile(rf"(.*\.)?({key})$")
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{_cut(key)} in {field} is not a regular expression: {error}") from error

    def matches(module: str, seconds: float) -> bool:
        if seconds <= 0:
            raise TimeoutError
        return compiled.match(module, timeout=seconds) is not None

    return matches


def _cut(key: str) -> str:
    return repr(key if len(key) <= 40 else f"{key[:40]}…")
