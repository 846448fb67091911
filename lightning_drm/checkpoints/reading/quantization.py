"""The formats of quantized weights: which stored tensors make up which weight, and the numbers that they stand for.

Three formats are dequantized exactly as their own libraries do it, on any machine: fp8 with a scale for each block or
tensor (DeepSeek's layout, which takes a few lines of arithmetic here), bitsandbytes in 4 and 8 bits, and
compressed-tensors. Others need kernels of an accelerator, or their library cannot dequantize single weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.architecture.facts import Architecture
from lightning_drm.checkpoints.reading.tensors import Tensors
from lightning_drm.storage.json_files import shown


@dataclass(frozen=True)
class Packed:
    """One quantized weight.

    Attributes:
        shape: Its shape as floats.
        parts: Names of the stored tensors that make it up.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]


class Quantization(ABC):
    """One format of quantized weights.

    Args:
        stored: The tensors as they are in the files.
        folder: The model's folder.
        settings: Its ``quantization_config``.

    Raises:
        ValueError: If the library that dequantizes it is missing, or the format is used in a way that is not supported.
    """

    library: ClassVar[str] = ""
    """Import name of the library that dequantizes it, if one is needed."""

    def __init__(self, stored: Tensors, folder: Path, settings: Mapping[str, Any]) -> None:
        if self.library and find_spec(self.library) is None:
            raise ValueError(f"dequantizing it needs {self.library}: pip install 'lightning_drm[quantized]'")
        self.stored, self.folder, self.settings = stored, folder, settings

    @abstractmethod
    def packed(self) -> dict[str, Packed]:
        """By name, every quantized weight."""

    @abstractmethod
    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """A weight's values in float32, from its stored parts by name."""


class Fp8(Quantization):
    """``quant_method: fp8``: a weight in float8, times a scale for each block of it or one for all."""

    def __init__(self, stored: Tensors, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(stored, folder, settings)
        block = settings.get("weight_block_size")
        if block and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise ValueError(f"weight_block_size must be two whole numbers, got {shown(block)}")

    @override
    def packed(self) -> dict[str, Packed]:
        headers, block = self.stored.headers, self.settings.get("weight_block_size")
        found, wrong = {}, []
        for name, header in headers.items():
            scale = f"{name}_scale_inv"
            if scale not in headers:
                continue
            grid = headers[scale].shape
            expected = (
                tuple(-(-size // step) for size, step in zip(header.shape[-2:], block, strict=True)) if block else ()
            )
            fits = grid[-2:] == expected if block else all(size == 1 for size in grid)
            if header.dtype != torch.float8_e4m3fn or not headers[scale].dtype.is_floating_point or not fits:
                wrong.append(f"{name} ({header.dtype}, {header.shape}) with scales {grid}")
            module = name.rpartition(".")[0]
            others = (f"{module}.{part}" for part in ("activation_scale", "input_scale"))
            found[name] = Packed(header.shape, (name, scale, *(other for other in others if other in headers)))
        if wrong:
            raise ValueError(f"expected float8_e4m3fn in blocks of {block}, got {', '.join(wrong[:3])}")
        return found

    @override
    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        weight, scale = parts[name].float(), parts[f"{name}_scale_inv"].float()
        block = self.settings.get("weight_block_size")
        if not block:
            return weight.mul_(scale.reshape(()))
        rows, columns = weight.shape[-2:]
        for start in range(0, rows, block[0]):  # a grid of the weight's size would be a second weight in memory
            row = scale[..., start // block[0], :].repeat_interleave(block[1], -1)[..., None, :columns]
            weight[..., start : start + block[0], :].mul_(row)
        return weight


class BitsAndBytes(Quantization):
    """``quant_method: bitsandbytes``: NF4 or FP4 with blockwise scales, or int8 with one scale for each row."""

    library = "bitsandbytes"

    def __init__(self, stored: Tensors, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(stored, folder, settings)
        if turned := Architecture.of_folder(folder, len(stored.headers)).transposed:
            raise ValueError(f"bitsandbytes stores {min(turned)} transposed, which is not supported")

    @override
    def packed(self) -> dict[str, Packed]:
        from bitsandbytes.utils import unpack_tensor_to_dict

        headers = self.stored.headers
        found = {}
        for name, header in headers.items():
            parts = tuple(part for part in headers if part == name or part.startswith(f"{name}."))
            state = next((part for part in parts if ".quant_state.bitsandbytes__" in part), None)
            scale = f"{name.removesuffix('.weight')}.SCB"
            if state is not None and state != name:
                shape = unpack_tensor_to_dict(self.stored.read(state))["shape"]
                found[name] = Packed(tuple(shape), parts)
            elif name.endswith(".weight") and scale in headers:
                kept = f"{name}_format"
                found[name] = Packed(header.shape, (name, scale, *([kept] if kept in headers else [])))
        return found

    @override
    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        import bitsandbytes

        scale = parts.get(f"{name.removesuffix('.weight')}.SCB")
        if scale is not None:
            rows: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(parts[name], scale.float())
            return rows.float()
        statistics = {part.removeprefix(f"{name}."): value for part, value in parts.items() if part != name}
        state = bitsandbytes.functional.QuantState.from_dict(statistics, torch.device("cpu"))
        state.dtype = torch.float32
        blocks: Tensor = bitsandbytes.functional.dequantize_4bit(parts[name], state)
        return blocks


class CompressedTensors(Quantization):
    """``quant_method: compressed-tensors``, in every layout that its library decompresses."""

    library = "compressed_tensors"

    def __init__(self, stored: Tensors, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(stored, folder, settings)
        from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

        self._converter = CompressedTensorsDequantizer(str(folder), dtype=torch.float32)

    @override
    def packed(self) -> dict[str, Packed]:
        headers = self.stored.headers
        found = {}
        for name, header in headers.items():
            others = self._converter.get_dependencies(name)
            if others.isdisjoint(headers):  # not quantized; Dequantized refuses codes that are left over
                continue
            module = name.rpartition(".")[0]
            missing = sorted(others - headers.keys())
            if missing:
                raise ValueError(f"{name} lacks {', '.join(missing)}")
            shape = header.shape
            if f"{module}.weight_shape" in others:
                shape = tuple(self.stored.read(f"{module}.weight_shape").tolist())
            found[f"{module}.weight"] = Packed(shape, (name, *sorted(others)))
        return found

    @override
    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        whole: Tensor = self._converter.process(dict(parts))[name]
        return whole


FORMATS: dict[str, type[Quantization]] = {
    "fp8": Fp8,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
}
"""By ``quant_method``, the formats that can be dequantized."""
