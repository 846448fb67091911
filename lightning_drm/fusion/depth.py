"""What LiNeS makes of the names of a model's parameters, in sentences: whether they tell a depth, and which."""

from collections.abc import Iterable

from lightning_drm.fusion.blocks import block_of, depths, towers
from lightning_drm.merging import LiNeS, Method


def problems_of_depth(method: Method, names: Iterable[str]) -> list[str]:
    """Why a method cannot tell how deep a model's parameters lie, in one sentence, if it has to and cannot.

    Args:
        method: The method.
        names: The names of all parameters of the model, merged or not.
    """
    names = list(names)
    if not isinstance(method, LiNeS) or towers(names):
        return []
    return [
        "LiNeS scales a model's blocks by their depth, which numbers in the parameters' names tell, as in "
        f"layers.0.weight and layers.1.weight; this model has none: its parameters are {', '.join(names[:3])}, …."
    ]


def notes_on_depth(method: Method, names: Iterable[str], merged: Iterable[str]) -> list[str]:
    """What the names of a model's parameters mean to a method, in a sentence, if they mean anything.

    Args:
        method: The method.
        names: The names of all parameters of the model.
        merged: Those of the parameters that are merged.

    Example:
        >>> from lightning_drm import DRM
        >>> names = ["embed.weight", "layer.0.weight", "layer.1.weight", "layer.2.weight"]
        >>> notes_on_depth(LiNeS(DRM()), names, names)
        ['LiNeS: the depth goes from layer.0 to layer.2 (3 blocks); 1 parameter is in no block.']
    """
    if not isinstance(method, LiNeS):
        return []
    places = [block_of(name) for name in merged]
    ranges = [
        f"from {tower[0]} to {tower[-1]} ({len(tower)} blocks)"
        for tower in towers(names)
        if not set(tower).isdisjoint(places)
    ]
    if not ranges:
        return ["LiNeS: no parameter that is merged is in a block, so all are scaled alike."]
    known = depths(names)
    outside = sum(block not in known for block in places)
    rest = f"; {outside} parameter{' is' if outside == 1 else 's are'} in no block" if outside else ""
    return [f"LiNeS: the depth goes {', and '.join(ranges)}{rest}."]
