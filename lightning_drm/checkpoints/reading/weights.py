"""Finetuned values: model folders and checkpoint files. A base comes in these formats, too."""

import json
from pathlib import Path
from typing import Any, Self

from typing_extensions import override

from lightning_drm.checkpoints.reading.quantized import as_floats
from lightning_drm.checkpoints.reading.task_input import Entry, TaskInput
from lightning_drm.checkpoints.reading.tensors import Tensors, container_of, model_files, plain_name
from lightning_drm.merging import Delta


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
        return model_files(path) is not None

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        found = model_files(path)
        assert found is not None, f"{path} is not a model folder"
        container, files = found
        return cls(path, as_floats(container(files), path, _config_of(path), dequantize), path)


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


def _config_of(folder: Path) -> dict[str, Any]:
    """What a model folder's ``config.json`` holds; nothing if there is none."""
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config
