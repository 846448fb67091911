"""Finetuned values: model folders and checkpoint files. A base comes in these formats, too."""

from pathlib import Path
from typing import Self

from typing_extensions import override

from lightning_drm.checkpoints.reading.model_files import has_model, open_model
from lightning_drm.checkpoints.reading.quantized import as_floats
from lightning_drm.checkpoints.reading.task_input import Entry, TaskInput
from lightning_drm.checkpoints.reading.tensors import Tensors, container_of, plain_name
from lightning_drm.merging import Delta
from lightning_drm.storage.json_files import read_object


class WeightsInput(TaskInput):
    """All weights of a model.

    Args:
        path: The file or folder.
        tensors: The weights.
        folder: The model's folder, if it is one.

    Attributes:
        tensors: The weights, under the names that the files have for them.
    """

    format = "weights"
    whole = True

    def __init__(self, path: Path, tensors: Tensors, folder: Path | None = None) -> None:
        super().__init__(path, tensors.files, folder)
        self.tensors = tensors
        self.ignored = tensors.ignored
        self._raw = {plain_name(name): name for name in tensors.headers}
        for name, raw in self._raw.items():
            header = tensors.headers[raw]
            if header.dtype.is_floating_point:
                self.entries[name] = Entry(header.shape, header.dtype)

    @property
    @override
    def is_mapped(self) -> bool:
        return self.tensors.is_mapped

    @override
    def read(self, name: str) -> Delta:
        return self.tensors.read(self._raw[name])


class ModelFolder(WeightsInput):
    """A folder that ``save_pretrained`` wrote, in one file or in shards."""

    expected = "a transformers folder (model.safetensors, pytorch_model.bin or their index)"

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        return has_model(path)

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        file = path / "config.json"
        config = read_object(file) if file.is_file() else {}
        return cls(path, as_floats(open_model(path), path, config, dequantize), path)


class CheckpointFile(WeightsInput):
    """A file of tensors by name, such as a Lightning checkpoint."""

    expected = "a checkpoint file (.ckpt, .pt, .pth, .bin, .safetensors)"

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        return path.is_file() and container_of(path) is not None

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        container = container_of(path)
        assert container is not None, f"{path} is not a file of tensors"
        return cls(path, as_floats(container([path]), path, {}, dequantize))
