"""What belongs to a model beside its weights: configuration, tokenizer, processor, license, and the tasks' heads."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.checkpoints.reading.card import metadata_of
from lightning_drm.merging.low_rank import densify
from lightning_drm.pretrained import public_name
from lightning_drm.storage import write_json, write_tensors
from lightning_drm.storage.json_files import read_object

# Whatever else lies in a folder may be anything, such as somebody's credentials.
_COMPANIONS = (
    CONFIG_NAME, GENERATION_CONFIG_NAME, FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME, TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/*.jinja",
    # vocabularies, as the classes of tokenizers call them
    "vocab.txt", "vocab.json", "merges.txt", "vocab.bpe", "bpe.codes", "dict.txt", "normalizer.json", "emoji.json",
    "*.tiktoken", "tekken.json", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "target.spm", "target_vocab.json", "entity_vocab.json",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
_WITH_NAMES = (CONFIG_NAME, TOKENIZER_CONFIG_FILE)
_NAMES = ("_name_or_path", "name_or_path")  # where transformers noted what it had loaded, which may be a path


def copy_companions(base: Path, output: Path, dtype: str, *, dequantized: bool = False) -> list[str]:
    """Copies the base's configuration, tokenizer, processor and license; nothing else that lies beside them.

    Args:
        base: The base's folder.
        output: The new folder.
        dtype: The precision in which the weights were written; ``auto`` if it is the base's.
        dequantized: Whether the base is quantized, but the new model is not.

    Returns:
        The files' names.

    Raises:
        ValueError: If a configuration is damaged.
    """
    names = [name for name in _companions(base) if _is_own(base / name, base)]
    for name in names:
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, output / name)
    for name in [name for name in _WITH_NAMES if name in names]:
        content = read_object(base / name)
        new = content | {key: public_name(value) for key in _NAMES if isinstance(value := content.get(key), str)}
        if name == CONFIG_NAME and dtype != "auto":
            new.pop("torch_dtype", None)
            new["dtype"] = str(getattr(torch, dtype)).removeprefix("torch.")
        if name == CONFIG_NAME and dequantized:
            new.pop("quantization_config", None)
        if new != content:
            write_json(output / name, new)
    return names


def companion_problems(base: Path) -> list[str]:
    """Why the base's files could not be copied, to be known before hours of merging.

    Args:
        base: The base's folder.
    """
    problems = []
    for name in _WITH_NAMES:
        if (base / name).is_file():
            try:
                read_object(base / name)
            except ValueError as error:
                problems.append(str(error))
    return problems


def notes_on_companions(base: Path) -> list[str]:
    """What a user should know of the base's files that `copy_companions` leaves out.

    Args:
        base: The base's folder.
    """
    led_out = [name for name in _companions(base) if not _is_own(base / name, base)]
    notes = [f"The base's {name} is a link that leads out of its folder, so it is not copied." for name in led_out]
    if code := sorted(file.name for file in base.glob("*.py")):
        notes.append(f"The base's own code is not copied: {', '.join(code)}. Copy it if the merged model needs it.")
    return notes


def _companions(base: Path) -> list[str]:
    files = {file for pattern in _COMPANIONS for file in base.glob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(base)) for file in files)


def _is_own(file: Path, base: Path) -> bool:
    """Whether a file is in the folder, or is a link to one of the same model's blobs, as in the hub's cache."""
    found, home = file.resolve(), base.resolve()
    blobs = home.parent.parent / "blobs"
    return found.is_relative_to(home) or (home.parent.name == "snapshots" and found.is_relative_to(blobs))


def license_of(base: Path | None) -> str | None:
    """The license that the base's model card names."""
    license = metadata_of(base).get("license")
    return str(license) if license else None


def write_heads(plan: Plan, folder: Path) -> None:
    """Writes every task's head as ``heads/<task>.safetensors``, under the task's own names.

    Args:
        plan: The plan.
        folder: The new folder.
    """
    for task in plan.tasks:
        tensors: dict[str, Tensor] = dict(task.input.head)
        for raw in task.head:
            tensors[raw] = densify(task.input.read(raw)).clone()  # the plan has none that is an adapter
        if tensors:
            write_tensors(folder / "heads" / f"{task.name}.safetensors", tensors, {"task": task.name})
