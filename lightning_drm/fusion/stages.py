"""The order in which a model's parameters are computed with: embeddings, one block after another, what comes last."""

from collections.abc import Iterable

from lightning_drm.fusion.blocks import block_of


def stages(names: Iterable[str]) -> list[list[str]]:
    """Parameters in groups that follow each other: a block is one, and so is what lies between two blocks.

    Args:
        names: The parameters' names, in the module's own order.

    Example:
        >>> stages(["embed.weight", "layer.0.weight", "layer.0.bias", "layer.1.weight", "norm.weight"])
        [['embed.weight'], ['layer.0.weight', 'layer.0.bias'], ['layer.1.weight'], ['norm.weight']]
    """
    groups: list[list[str]] = []
    last: str | None = None
    for name in names:
        block = block_of(name)
        if block != last:
            groups.append([])
        groups[-1].append(name)
        last = block
    return groups
