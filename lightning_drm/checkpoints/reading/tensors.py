"""Files of named tensors: their headers at once, their values one at a time.

A file is opened for each read and closed after it. Both kinds of files are mapped into memory, so an open file would
keep every page that was ever read; this way, a merge's memory does not grow with the size of the models.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.inert_pickle import inert_pickle, kinds_in

DTYPES = {  # by what safetensors calls it
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PLACES = ("state_dict", "model")  # where a Trainer's checkpoint has the weights, and where those of Fabric have them
_SAMPLE = 1 << 20
_LONGEST_REASON = 200  # characters of what torch says of a damaged file


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Tensors(ABC):
    """Named tensors of one model, in one or many files.

    Attributes:
        files: The files.
        headers: What they say of each tensor.
        file_of: The file that holds each tensor.
        ignored: What else the files hold and nobody reads: names of classes and functions.
    """

    suffixes: ClassVar[tuple[str, ...]]
    """Endings of such files."""

    model_file: ClassVar[str]
    """What ``save_pretrained`` calls a model's file of this kind."""

    adapter_file: ClassVar[str]
    """What peft calls an adapter's file of this kind."""

    is_mapped: ClassVar[bool] = False
    """Whether `read` costs next to nothing until values are looked at, and then only for those."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.headers: dict[str, TensorHeader] = {}
        self.file_of: dict[str, Path] = {}
        self.ignored: set[str] = set()

    def _add(self, name: str, header: TensorHeader, file: Path) -> None:
        if name in self.headers:
            raise ValueError(f"{file} holds {name}, which {self.file_of[name].name} holds, too.")
        self.headers[name], self.file_of[name] = header, file

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor's values, on the CPU; a view of the file until it is freed."""

    def hyperparameters(self) -> object:
        """What the files keep under ``hyper_parameters`` beside their tensors, as plain values; ``None`` if nothing."""
        return None


class SafetensorsFiles(Tensors):
    """Tensors in one or many safetensors files.

    Args:
        files: The files.

    Raises:
        ValueError: If a file is not a safetensors file, or a tensor has a type that torch does not know.
    """

    suffixes = (".safetensors",)
    model_file = "model.safetensors"
    adapter_file = "adapter_model.safetensors"
    is_mapped = True

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        for path in files:
            try:
                with _open(path) as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        part = file.get_slice(name)
                        dtype = DTYPES.get(part.get_dtype())
                        if dtype is None:
                            raise ValueError(f"{path}: {name} has the type {part.get_dtype()}, which is not supported.")
                        self._add(name, TensorHeader(tuple(part.get_shape()), dtype), path)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{path} cannot be read: {error}.") from error
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error

    @override
    def read(self, name: str) -> Tensor:
        with _open(self.file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class PickleFiles(Tensors):
    """Tensors in files that ``torch.save`` wrote: ``.bin``, ``.pt``, ``.pth`` and Lightning's ``.ckpt``.

    Nothing in a file is executed: objects other than tensors and plain containers, such as hyper-parameters, become
    inert placeholders.

    Args:
        files: The files.

    Raises:
        ValueError: If a file cannot be read, or holds no tensors by name.
    """

    suffixes = (".bin", ".ckpt", ".pt", ".pth")
    model_file = "pytorch_model.bin"
    adapter_file = "adapter_model.bin"

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._with_objects: set[Path] = set()
        for path in files:
            content = self._load(path)
            self.ignored |= kinds_in(content)
            for name, tensor in _tensors_in(content, path).items():
                self._add(name, TensorHeader(tuple(tensor.shape), tensor.dtype), path)

    @override
    def read(self, name: str) -> Tensor:
        path = self.file_of[name]
        return _tensors_in(self._load(path), path)[name].detach()

    @override
    def hyperparameters(self) -> object:
        content = self._load(self.files[0])
        return content.get("hyper_parameters") if isinstance(content, Mapping) else None

    def _load(self, path: Path) -> Any:
        """What a file holds, its tensors mapped and not read."""
        try:
            if path not in self._with_objects:
                try:
                    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                except pickle.UnpicklingError:  # holds other objects, as most Lightning checkpoints do
                    self._with_objects.add(path)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=inert_pickle)
        except Exception as error:  # a damaged pickle may be any sequence of operations, which fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path} cannot be read as a file that torch.save wrote: {reason.partition('. ')[0][:_LONGEST_REASON]}"
            ) from error


CONTAINERS: list[type[Tensors]] = [SafetensorsFiles, PickleFiles]
"""The kinds of files that tensors come in, the preferred one first."""


def container_of(file: Path) -> type[Tensors] | None:
    """The class that reads a file, by the file's ending; ``None`` if there is none."""
    return next((container for container in CONTAINERS if file.suffix in container.suffixes), None)


def _tensors_in(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name of what ``torch.save`` wrote."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in _PLACES if isinstance(content.get(key), Mapping)), content)
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        places = " or ".join(map(repr, _PLACES))
        raise ValueError(f"{path} holds no tensors by name, neither at its top nor under {places}.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is not a plain tensor with its values beside it.")
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DDP add to it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def quick_fingerprint(files: Sequence[Path]) -> str:
    """A hash of the names, sizes, first and last megabytes of files, by which versions differ; most is never read."""
    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _open(path: Path) -> Any:  # safetensors ships no types
    return safe_open(path, framework="pt")
