"""A pickle module for ``torch.load`` that rebuilds tensors and nothing else.

Beside the weights, Lightning checkpoints hold hyper-parameters of any class, and ``weights_only`` refuses to read such
a file at all. Here every class and function outside a short list becomes a placeholder that accepts anything and does
nothing, so the weights can be read without trusting the file.
"""

import collections
import pickle
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # its name in older pickles, which torch writes
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}


_LONGEST_NAME = 40


class Placeholder:
    """Stands for any object that is not a tensor.

    Attributes:
        kind: The name of its class or function, as the file gives it; nothing was looked up by it.
        state: Its attributes, if the file gives them as a dictionary.
    """

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        """Ignores all arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        """Stands for whatever the call would have made, too."""
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignores a list's item."""

    def extend(self, values: Any) -> None:
        """Ignores a list's items."""

    def add(self, value: Any) -> None:
        """Ignores a set's item."""


# The Python version of `pickle.Unpickler`: the other one makes a list as long as the highest number that a damaged file
# gives to an object, which fills the memory of any machine.
class InertUnpickler(pickle._Unpickler):
    """Finds torch's own tensor types; anything else is a `Placeholder`."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function to use for a name in the file."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage"):
            found = getattr(torch.storage if module == "torch.storage" else torch, name, None)
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        return type("Placeholder", (Placeholder,), {"kind": name})


def parts_of(value: object) -> Iterator[object]:
    """A value from a pickle and everything in it, through dictionaries, lists and tuples; each object once.

    A file may nest them deeper than Python calls functions, or put one into itself.
    """
    left, seen = [value], set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Mapping):
            left += reversed(list(part.values()))
        elif isinstance(part, list | tuple):
            left += reversed(part)


def kinds_in(value: object) -> set[str]:
    """The names of the classes and functions in whose place a value has a `Placeholder`."""
    return {part.kind for part in parts_of(value) if isinstance(part, Placeholder)}


def note_on_ignored(kinds: set[str]) -> str:
    """Tells a user, once for a file, that it holds more than tensors.

    Args:
        kinds: From `kinds_in`.

    Example:
        >>> note_on_ignored({"PosixPath"})
        'its file holds objects other than tensors (PosixPath), which are ignored and not run.'
    """
    names = sorted(kind[:_LONGEST_NAME] for kind in kinds if kind.isprintable())  # a file may put anything into a name
    listed = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
    return f"its file holds objects other than tensors ({listed}), which are ignored and not run."


def _load(file: Any, **kwargs: Any) -> Any:
    return InertUnpickler(file, **kwargs).load()


inert_pickle = types.ModuleType("inert_pickle", __doc__)
inert_pickle.Unpickler = InertUnpickler  # type: ignore[attr-defined]
inert_pickle.load = _load  # type: ignore[attr-defined]
