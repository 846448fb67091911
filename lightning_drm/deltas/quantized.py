"""Layers of bitsandbytes, whose weights are stored in 4 or 8 bits, under LoRA (QLoRA).

Such weights cannot be trained, and are never made whole here: their fingerprint is that of what is stored, and copies
of a module share its quantized layers' weights. On some CPUs bitsandbytes would arrange 4-bit weights in another way
when it predicts for the first time. This loses bits of their scales, and training fails from then on; `keep_as_stored`
prevents it.
"""

import copy
import sys

import torch
from torch import Tensor, nn

from lightning_drm.deltas.fingerprint import fingerprint, hash_tensor

_REARRANGES = "support_avx512bf16_for_cpu"  # the layer's own switch


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in 4 or 8 bits."""
    library = sys.modules.get("bitsandbytes.nn")
    if library is None or not isinstance(layer, library.Linear4bit | library.Linear8bitLt):
        return False
    return not layer.weight.is_floating_point()


def weight_shape(layer: nn.Module) -> torch.Size:
    """The shape of the weight that a quantized layer stands for, which is not that of its codes."""
    assert isinstance(layer, nn.Linear)
    return torch.Size((layer.out_features, layer.in_features))


def hash_stored(layer: nn.Module) -> str:
    """Hash of a quantized layer's weight as it is stored: codes, scales and the settings that they are read by."""
    stored: dict[str, Tensor] = {}
    layer._save_to_state_dict(stored, "", False)
    return fingerprint({name: hash_tensor(tensor) for name, tensor in stored.items() if name != "bias"})


def keep_as_stored(module: nn.Module) -> None:
    """Keeps bitsandbytes from arranging 4-bit weights in another way.

    Args:
        module: Any module, which is changed.
    """
    for layer in module.modules():
        if is_quantized(layer) and hasattr(layer, _REARRANGES):
            setattr(layer, _REARRANGES, False)


def twin(layer: nn.Module) -> nn.Module:
    """A quantized layer with the same weight in memory, and hooks and mode of its own."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            vars(other)[name] = value.copy()
    keep_as_stored(other)
    return other
