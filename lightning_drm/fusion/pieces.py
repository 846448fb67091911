"""Large tensors a few rows at a time.

Where every entry is merged by itself, a parameter need not be in memory as a whole: a piece of it is read, merged and
written while it is in the cache, in memory that the piece before it has just left. A whole parameter would cost a page
fault for every 4 KB of every delta, which takes longer than the arithmetic.
"""

from math import prod

import torch

from lightning_drm.merging.method import PIECE_STEP

PIECE = 1 << 20  # entries of a piece on the CPU
DEVICE_PIECE = 1 << 24  # and elsewhere: enough to occupy an accelerator


def pieces(shape: tuple[int, ...], device: torch.device) -> list[slice | None]:
    """Divides a tensor's rows into pieces of about the same number of entries.

    Args:
        shape: The tensor's shape.
        device: Where pieces are worked on.

    Returns:
        The rows of each piece, or ``None`` for the tensor as it is. Pieces depend on nothing else, and start at a
        multiple of `PIECE_STEP` entries.

    Example:
        >>> pieces((40_000, 64), torch.device("cpu"))
        [slice(0, 16384, None), slice(16384, 32768, None), slice(32768, 40000, None)]
    """
    entries = PIECE if device.type == "cpu" else DEVICE_PIECE
    if prod(shape) <= entries:
        return [None]
    step = max(PIECE_STEP, entries // max(1, prod(shape[1:])) // PIECE_STEP * PIECE_STEP)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def largest_piece(shape: tuple[int, ...], device: torch.device) -> int:
    """How many entries the largest of a tensor's pieces has."""
    found = pieces(shape, device)
    return prod(shape) if found[0] is None else (found[0].stop - found[0].start) * prod(shape[1:])
