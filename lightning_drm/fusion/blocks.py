"""The blocks of a model's depth, which the names of its parameters tell.

A block is the part of a name up to its first number: ``encoder.layer.3`` in ``encoder.layer.3.attention.query.weight``.
Blocks whose names differ in numbers only follow each other, and make up a tower. An encoder and a decoder, or the
vision and the text side of a model, are two, and each has a first and a last block of its own; ``layer1.0``,
``layer1.1``, ``layer2.0``, … of a ResNet are one. A block that is alone has no depth.
"""

import re
from collections.abc import Iterable

OUTSIDE = "outside blocks"
"""Parameters that are in no block: embeddings, say."""

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")
_NUMBER = re.compile(r"\d+")


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


def towers(names: Iterable[str]) -> list[list[str]]:
    """The blocks of each tower, from the first to the last.

    Args:
        names: The names of all parameters of a model, so that blocks that were not trained count.

    Example:
        >>> names = ["embed.weight", "vision.layers.0.fc.weight", "vision.layers.1.fc.weight"]
        >>> towers([*names, "text.layers.0.fc.weight", "text.layers.2.fc.weight", "text.layers.11.fc.weight"])
        [['vision.layers.0', 'vision.layers.1'], ['text.layers.0', 'text.layers.2', 'text.layers.11']]
    """
    found: dict[str, list[str]] = {}
    for block in dict.fromkeys(map(block_of, names)):
        if block != OUTSIDE:
            found.setdefault(_NUMBER.sub("", block), []).append(block)
    return [sorted(blocks, key=_numbers) for blocks in found.values() if len(blocks) > 1]


def depths(names: Iterable[str]) -> dict[str, float]:
    """By block, how deep it lies in its tower: l / (L − 1), from 0 for the first to 1 for the last.

    Args:
        names: As for `towers`.

    Example:
        >>> depths(["0.weight", "0.bias", "2.weight", "4.weight"])
        {'0': 0.0, '2': 0.5, '4': 1.0}
    """
    return {block: place / (len(tower) - 1) for tower in towers(names) for place, block in enumerate(tower)}


def _numbers(block: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(block)]


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]
