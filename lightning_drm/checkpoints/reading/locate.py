"""From what a user writes, a path or a hub name, to something that can be read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from lightning_drm.checkpoints.reading.adapter import CONFIG_FILE, AdapterInput
from lightning_drm.checkpoints.reading.lora_checkpoint import LoraCheckpoint
from lightning_drm.checkpoints.reading.quantized import Dequantized, dequantized, quantized_names
from lightning_drm.checkpoints.reading.source import StoredInput, TaskInput, WeightsInput
from lightning_drm.checkpoints.reading.tensors import (
    PickleFiles,
    SafetensorsFiles,
    Tensors,
    indexed_files,
    load_hyperparameters,
)
from lightning_drm.deltas import DELTAS_FILE, HEAD_FILE, StoredDeltas
from lightning_drm.pretrained import resolve_pretrained

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_EXPECTED = (
    "a transformers folder (model.safetensors, pytorch_model.bin or their index), a PEFT adapter folder "
    "(adapter_config.json), a checkpoint file (.ckpt, .pt, .bin, .safetensors) or a run folder with stored deltas"
)


@dataclass
class BaseModel:
    """The base: its tensors and, where it is a folder, what lies beside them."""

    name: str
    folder: Path | None
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dequantized(self) -> bool:
        """Whether its files are quantized, and its tensors are not."""
        return isinstance(self.tensors, Dequantized)


def open_base(name: str, dequantize: bool = False) -> BaseModel:
    """Opens the base.

    Args:
        name: A folder, a file, ``package:…`` or a hub name.
        dequantize: Read quantized weights as floats; they are refused otherwise.

    Raises:
        ValueError: If there is no such thing, or it is not a model's whole weights.
    """
    path = _locate(name)
    if path.is_file():
        return BaseModel(name, None, _floats(path, _file_tensors(path), f"The base {name}", dequantize))
    if (path / CONFIG_FILE).is_file():
        raise ValueError(f"The base {name} is an adapter; expected the model that it adapts.")
    tensors = _folder_tensors(path)
    if tensors is None:
        raise ValueError(
            f"The base {name} holds no weights: expected model.safetensors, pytorch_model.bin or an index."
        )
    return BaseModel(name, path, _floats(path, tensors, f"The base {name}", dequantize), _config(path))


def open_input(name: str, task: str, dequantize: bool = False) -> TaskInput:
    """Opens a finetune.

    Args:
        name: A folder, a file or a hub name.
        task: The task's name, which also names it in a run folder of several tasks.
        dequantize: Read quantized weights as floats; they are refused otherwise.

    Raises:
        ValueError: If there is no such thing, or it has no exact delta.
    """
    path = _locate(name)
    if path.is_file():
        return _checkpoint(path, dequantize)
    if (path / CONFIG_FILE).is_file():
        return AdapterInput(path)
    stored = next((p for p in (path, path / "tasks" / task) if (p / DELTAS_FILE).is_file()), None)
    if stored is not None:
        deltas = StoredDeltas(stored / DELTAS_FILE)
        head = load_file(stored / HEAD_FILE) if (stored / HEAD_FILE).is_file() else {}
        return StoredInput(stored, deltas, head, json.loads(deltas.metadata["base_hashes"]))
    tensors = _folder_tensors(path)
    if tensors is None:
        raise ValueError(f"{name} holds nothing to merge; expected {_EXPECTED}.")
    return WeightsInput(path, _floats(path, tensors, name, dequantize), path)


def _locate(name: str) -> Path:
    path = Path(resolve_pretrained(name)).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}.")
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot"]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name} is no file or folder here, and the hub has no such model, or not for you.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no file or folder here, and the hub cannot be asked: there is no connection, or HF_HUB_OFFLINE "
            "is set."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{name} is no file or folder here, and the hub does not give it: {_first(error)}") from error


def _folder_tensors(path: Path) -> Tensors | None:
    readers: dict[str, type[Tensors]] = {"model.safetensors": SafetensorsFiles, "pytorch_model.bin": PickleFiles}
    for index, reader in readers.items():
        if (path / index).is_file():
            return reader([path / index])
        if (path / f"{index}.index.json").is_file():
            return reader(indexed_files(path / f"{index}.index.json"))
    return None


def _file_tensors(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    if path.suffix in _PICKLES:
        return PickleFiles([path])
    raise ValueError(f"{path} has an unknown ending; expected {_EXPECTED}.")


def _checkpoint(path: Path, dequantize: bool) -> TaskInput:
    tensors = _file_tensors(path)
    if any(".lora_" in name or ".base_layer." in name for name in tensors.headers):
        return LoraCheckpoint(path, tensors, load_hyperparameters(path) if path.suffix in _PICKLES else None)
    return WeightsInput(path, _floats(path, tensors, str(path), dequantize))


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def _floats(path: Path, tensors: Tensors, what: str, dequantize: bool) -> Tensors:
    """The tensors, dequantized if they have to be and may be."""
    config = _config(path)
    names = quantized_names(tensors.headers)
    if not config.get("quantization_config") and not names:
        return tensors
    if not dequantize:
        method = config.get("quantization_config", {}).get("quant_method") or f"found {names[0]}"
        raise ValueError(
            f"{what} is quantized ({method}), so sums of its weights and deltas are not its weights; "
            "merge the unquantized weights and quantize the result, or say --dequantize true."
        )
    try:
        return dequantized(tensors, path, config)
    except ValueError as error:
        raise ValueError(f"{what} is quantized, and {error}.") from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
