"""From what a user writes, a path or a hub name, to something that can be read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

from lightning_drm.deltas import DELTAS_FILE, HEAD_FILE, StoredDeltas
from lightning_drm.engine.inputs.adapter import CONFIG_FILE, AdapterInput
from lightning_drm.engine.inputs.source import StoredInput, TaskInput, WeightsInput
from lightning_drm.engine.inputs.tensors import PickleFiles, SafetensorsFiles, Tensors, indexed_files
from lightning_drm.pretrained import resolve_pretrained

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_EXPECTED = (
    "a transformers folder (model.safetensors, pytorch_model.bin or their index), a PEFT adapter folder "
    "(adapter_config.json), a checkpoint file (.ckpt, .pt, .bin, .safetensors) or a run folder with stored deltas"
)
_QUANTISED_SUFFIXES = (
    ".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv",
)  # fmt: skip


@dataclass
class BaseModel:
    """The base: its tensors and, where it is a folder, what lies beside them."""

    name: str
    folder: Path | None
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)


def open_base(name: str) -> BaseModel:
    """Opens the base.

    Args:
        name: A folder, a file, ``package:…`` or a hub name.

    Raises:
        ValueError: If there is no such thing, or it is not a model's whole weights.
    """
    path = _locate(name)
    if path.is_file():
        return BaseModel(name, None, _file_tensors(path))
    if (path / CONFIG_FILE).is_file():
        raise ValueError(f"The base {name} is an adapter; expected the model that it adapts.")
    tensors = _folder_tensors(path)
    if tensors is None:
        raise ValueError(
            f"The base {name} holds no weights: expected model.safetensors, pytorch_model.bin or an index."
        )
    _refuse_quantised(path, tensors, f"The base {name}")
    return BaseModel(name, path, tensors, _config(path))


def open_input(name: str, task: str) -> TaskInput:
    """Opens a finetune.

    Args:
        name: A folder, a file or a hub name.
        task: The task's name, which also names it in a run folder of several tasks.

    Raises:
        ValueError: If there is no such thing, or it has no exact delta.
    """
    path = _locate(name)
    if path.is_file():
        return _checkpoint(path)
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
    _refuse_quantised(path, tensors, name)
    return WeightsInput(path, tensors, path)


def _locate(name: str) -> Path:
    path = Path(resolve_pretrained(name)).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}.")
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
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


def _checkpoint(path: Path) -> TaskInput:
    tensors = _file_tensors(path)
    if any(".lora_A." in name or ".base_layer." in name for name in tensors.headers):
        raise ValueError(
            f"{path} holds LoRA layers, whose scaling a checkpoint does not keep; "
            "save the adapter with peft's save_pretrained, or merge from the run folder."
        )
    return WeightsInput(path, tensors)


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


def _refuse_quantised(path: Path, tensors: Tensors, what: str) -> None:
    quantisation = _config(path).get("quantization_config")
    names = [name for name in tensors.headers if name.endswith(_QUANTISED_SUFFIXES)]
    if quantisation or names:
        method = quantisation.get("quant_method", "unknown") if quantisation else f"found {names[0]}"
        raise ValueError(
            f"{what} is quantised ({method}), so sums of its weights and deltas are not its weights; "
            "merge the unquantised weights, and quantise the result."
        )


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
