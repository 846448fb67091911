"""Proof that two tasks started from the same base: one hash per parameter, and one over all of them.

The hashes cover names, shapes, dtypes and bytes. They are not cryptographic: they reveal mistakes, not
forgeries.
"""

from collections.abc import Iterable, Mapping
from ctypes import c_char

import torch
import xxhash
from torch import Tensor


def hash_tensor(tensor: Tensor) -> str:
    """128-bit hash of a tensor's shape, dtype and values, the same on every device.

    Example:
        >>> import torch
        >>> hash_tensor(torch.zeros(2)) == hash_tensor(torch.zeros(2))
        True
        >>> hash_tensor(torch.zeros(2)) == hash_tensor(torch.zeros(1, 2))
        False
    """
    return hash_pieces(tensor.shape, tensor.dtype, [tensor])


def hash_pieces(shape: Iterable[int], dtype: torch.dtype, pieces: Iterable[Tensor]) -> str:
    """The hash of a tensor that comes in pieces, so that not all of it is in memory.

    Args:
        shape: The tensor's shape.
        dtype: Its type.
        pieces: Its values, some rows after the others.

    Example:
        >>> whole = torch.arange(6.0).view(3, 2)
        >>> hash_pieces((3, 2), whole.dtype, [whole[:1], whole[1:]]) == hash_tensor(whole)
        True
    """
    digest = xxhash.xxh3_128(f"{tuple(shape)}{dtype}".encode())
    for piece in pieces:
        if piece.numel():
            values = piece.detach().cpu().contiguous()
            # Not by `numpy()`, after which a storage keeps its size for good: FSDP1 frees weights by making it zero.
            digest.update((c_char * values.nbytes).from_address(values.data_ptr()))
    return digest.hexdigest()


def fingerprint(hashes: Mapping[str, str]) -> str:
    """One hash over the hashes of all parameters; their order does not matter."""
    lines = "\n".join(f"{name}={value}" for name, value in sorted(hashes.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def describe_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Says in words how two bases differ; ``None`` if they are the same.

    Args:
        ours: Hash by parameter name of one base.
        theirs: The same of the other one.
    """
    extra = sorted(theirs.keys() - ours.keys())
    missing = sorted(ours.keys() - theirs.keys())
    changed = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("differing values", changed), ("missing", missing), ("unknown", extra))
        if names
    ]
    return "; ".join(parts) or None
