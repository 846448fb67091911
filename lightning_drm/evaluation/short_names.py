"""Names of parameters and blocks for tables and figures."""

from collections.abc import Iterable

from lightning_drm.fusion.blocks import OUTSIDE


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
