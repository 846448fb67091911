"""Parts of a model that studies tell apart: the blocks of its depth, by the names of its parameters."""

import re
from collections.abc import Iterable

OUTSIDE = "outside blocks"
"""Parameters that are in no block: embeddings, say."""

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")


def block_of(name: str) -> str:
    """The block that a parameter is in: its name up to the first number.

    Args:
        name: The parameter's name.

    Example:
        >>> block_of("encoder.layer.3.attention.query.weight"), block_of("0.weight"), block_of("embeddings.weight")
        ('encoder.layer.3', '0', 'outside blocks')
    """
    found = _BLOCK.match(name)
    return found.group() if found else OUTSIDE


def in_depth(names: Iterable[str]) -> list[str]:
    """Names in the order of their numbers: layer 2 before layer 10, and what is outside blocks first.

    Args:
        names: Names of parameters or of blocks.

    Example:
        >>> in_depth(["layer.10.weight", "layer.2.weight", "outside blocks"])
        ['outside blocks', 'layer.2.weight', 'layer.10.weight']
    """
    return sorted(names, key=lambda name: (name != OUTSIDE, _with_numbers(name)))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """By name, what tells it from the others: without the words that all begin with, but for one before a number.

    Args:
        names: Names of parameters or of blocks.

    Example:
        >>> short_names(["outside blocks", "model.layer.0", "model.layer.1"])
        {'outside blocks': 'outside blocks', 'model.layer.0': 'layer.0', 'model.layer.1': 'layer.1'}
    """
    names = list(names)
    inside = [name.split(".") for name in names if name != OUTSIDE]
    shortest = min((len(words) for words in inside), default=1)
    same = 0
    while same < shortest - 1 and len({words[same] for words in inside}) == 1:
        same += 1
    if same and any(words[same].isdecimal() for words in inside):
        same -= 1
    return {name: name if name == OUTSIDE else ".".join(name.split(".")[same:]) for name in names}


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]
