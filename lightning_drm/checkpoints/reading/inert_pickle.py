"""A pickle module for ``torch.load`` that rebuilds tensors and nothing else.

Beside the weights, Lightning checkpoints hold hyper-parameters of any class, and ``weights_only`` refuses to read such
a file at all. Here every class and function outside a short list becomes a placeholder that accepts anything and does
nothing, so the weights can be read without trusting the file.
"""

import collections
import pickle
import types
from typing import Any

import torch

_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}


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


class InertUnpickler(pickle.Unpickler):
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


def _load(file: Any, **kwargs: Any) -> Any:
    return InertUnpickler(file, **kwargs).load()


inert_pickle = types.ModuleType("inert_pickle", __doc__)
inert_pickle.Unpickler = InertUnpickler  # type: ignore[attr-defined]
inert_pickle.load = _load  # type: ignore[attr-defined]
