"""Quantized models, read as the floats that their weights stand for, one weight at a time.

A quantized layer stores codes and scales in place of its weight. Sums of codes mean nothing, so a merge refuses such
files unless it is told to turn each weight back into floats as it is read. The precision that quantization took does
not come back: a finetune's delta then includes the difference of two roundings.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.quantization import FORMATS, Quantization
from lightning_drm.checkpoints.reading.tensors import TensorHeader, Tensors
from lightning_drm.storage.json_files import field, shown

_SUFFIXES = (
    ".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv",
)  # fmt: skip
_DEFAULT_DTYPE = torch.bfloat16  # of a model whose configuration does not name one


class Dequantized(Tensors):
    """A quantized model's tensors, every weight under its own name and in floats.

    Args:
        stored: The tensors as they are in the files.
        quantization: Their format.
        dtype: The precision that the weights stand for; they are read in float32.
    """

    def __init__(self, stored: Tensors, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__(stored.files)
        self._stored, self._quantization = stored, quantization
        self.ignored = stored.ignored
        self._packed = quantization.packed()
        hidden = {part for packed in self._packed.values() for part in packed.parts}
        left = [name for name in stored.headers if name not in hidden]
        self.headers = {name: stored.headers[name] for name in left}
        self.headers |= {name: TensorHeader(packed.shape, dtype) for name, packed in self._packed.items()}
        codes = [name for name in left if stored.headers[name].dtype.itemsize == 1 and name.endswith("weight")]
        if unclear := [*_quantized_names(left), *codes]:
            raise ValueError(f"{', '.join(unclear[:3])} does not belong to any weight that can be dequantized")

    @override
    def read(self, name: str) -> Tensor:
        packed = self._packed.get(name)
        if packed is None:
            return self._stored.read(name)
        return self._quantization.unpack(name, {part: self._stored.read(part) for part in packed.parts})


def as_floats(tensors: Tensors, path: Path, config: Mapping[str, Any], dequantize: bool) -> Tensors:
    """The tensors as they are, or, if they are quantized, as floats.

    Args:
        tensors: The tensors as they are in the files.
        path: The file or folder that they are in.
        config: What the folder's ``config.json`` holds.
        dequantize: Whether quantized weights may be read as floats.

    Raises:
        ValueError: If they are quantized, and may not or cannot be dequantized.
    """
    names = _quantized_names(tensors.headers)
    where = str(path / "config.json")
    settings = field(config, "quantization_config", dict, where, {})
    if not settings and not names:
        return tensors
    if not dequantize:
        method = settings.get("quant_method") or (f"found {names[0]}" if names else "by its config.json")
        raise ValueError(
            f"{path} is quantized ({method}), so sums of its weights and deltas are not its weights; "
            "merge the unquantized weights and quantize the result, or set dequantize to true."
        )
    try:
        return _dequantized(tensors, path, settings, _dtype(config, where))
    except Exception as error:  # three libraries read what the files say, and damaged files make them fail in any way
        raise ValueError(f"{path} is quantized, and {' '.join(str(error).split()).rstrip('.')}.") from error


def _dequantized(stored: Tensors, folder: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> Dequantized:
    if not settings:
        raise ValueError("it has no quantization_config in its config.json that would say how to dequantize it")
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown")
    if method not in FORMATS:
        raise ValueError(f"{method} cannot be dequantized here, only {', '.join(FORMATS)} can")
    return Dequantized(stored, FORMATS[method](stored, folder, settings), dtype)


def _dtype(config: Mapping[str, Any], where: str) -> torch.dtype:
    """The precision that a model's weights stand for."""
    name = field(config, "dtype", str, where, "") or field(config, "torch_dtype", str, where, "")
    found = getattr(torch, name, None) if name else _DEFAULT_DTYPE
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the dtype {shown(name)} in its config.json is unknown")
    return found


def _quantized_names(names: Iterable[str]) -> list[str]:
    """The names that only quantized models have."""
    return [name for name in names if name.endswith(_SUFFIXES)]
