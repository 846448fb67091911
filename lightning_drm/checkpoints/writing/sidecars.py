"""What belongs to a model beside its weights: configuration, tokenizer, processor, license, and the tasks' heads."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.storage import write_tensors

_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.spm", "LICENSE*", "NOTICE*")
_LEFT = (
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "all_results.json",
    "*_results.json",
    "report.json",
)


def copy_companions(base: Path, output: Path, dtype: str, *, dequantized: bool = False) -> list[str]:
    """Copies the base's small files: everything that ``from_pretrained`` may ask for.

    Args:
        base: The base's folder.
        output: The new folder.
        dtype: The precision in which the weights were written; ``auto`` if it is the base's.
        dequantized: Whether the base is quantized, but the new model is not.

    Returns:
        The files' names.
    """
    files = {file for pattern in _KEPT for file in base.glob(pattern) if file.is_file()}
    files -= {file for pattern in _LEFT for file in base.glob(pattern)}
    for file in sorted(files):
        shutil.copyfile(file, output / file.name)
    config = output / "config.json"
    if config.is_file() and (dtype != "auto" or dequantized):
        content = json.loads(config.read_text(encoding="utf-8"))
        if dtype != "auto":
            content.pop("torch_dtype", None)
            content["dtype"] = str(getattr(torch, dtype)).removeprefix("torch.")
        if dequantized:
            content.pop("quantization_config", None)
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sorted(file.name for file in files)


def license_of(base: Path | None) -> str | None:
    """The license that the base's model card names."""
    if base is None or not (base / "README.md").is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        license = ModelCard.load(base / "README.md").data.get("license")
    except (ValueError, OSError):  # no metadata, or not YAML
        return None
    return str(license) if license else None


def write_heads(plan: Plan, folder: Path) -> None:
    """Writes every task's head as ``heads/<task>.safetensors``, under the task's own names.

    Args:
        plan: The plan.
        folder: The new folder.

    Raises:
        ValueError: If a head was trained as an adapter, which has no value of its own.
    """
    for task in plan.tasks:
        tensors: dict[str, Tensor] = dict(task.input.head)
        for raw in task.head:
            value = task.input.read(raw)
            if not isinstance(value, Tensor):
                raise ValueError(f"{task.name}: its head has an adapter at {raw}; save it as modules_to_save.")
            tensors[raw] = value.clone()
        if tensors:
            write_tensors(folder / "heads" / f"{task.name}.safetensors", tensors, {"task": task.name})
