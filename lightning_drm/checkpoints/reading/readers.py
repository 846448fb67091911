"""The list of readers, one for each format, and opening a finetune or a base in any of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_drm.checkpoints.reading.adapter import AdapterInput
from lightning_drm.checkpoints.reading.litgpt import LitgptFolder, LitgptTensors
from lightning_drm.checkpoints.reading.locate import locate
from lightning_drm.checkpoints.reading.lora_checkpoint import LoraCheckpoint
from lightning_drm.checkpoints.reading.quantized import Dequantized
from lightning_drm.checkpoints.reading.stored import StoredInput
from lightning_drm.checkpoints.reading.task_input import TaskInput
from lightning_drm.checkpoints.reading.tensors import Tensors
from lightning_drm.checkpoints.reading.weights import CheckpointFile, ModelFolder, WeightsInput

READERS: list[type[TaskInput]] = [AdapterInput, StoredInput, ModelFolder, LitgptFolder, LoraCheckpoint, CheckpointFile]
"""The first one that opens a path reads it. A new format is one more line here."""


@dataclass
class BaseModel:
    """The base that all tasks started from.

    Attributes:
        name: What the user called it.
        folder: Its folder, if it is one.
        tensors: Its weights, under its own names.
    """

    name: str
    folder: Path | None
    tensors: Tensors

    @property
    def is_dequantized(self) -> bool:
        """Whether its files are quantized, but its tensors are not."""
        return isinstance(self.tensors, Dequantized)

    @property
    def is_of_litgpt(self) -> bool:
        """Whether its files are litgpt's, and its tensors are named as transformers names them."""
        return isinstance(self.tensors, LitgptTensors)


def open_input(name: str, task: str, dequantize: bool = False) -> TaskInput:
    """Opens a finetune.

    Args:
        name: A folder, a file, ``package:…`` or a hub name.
        task: The task's name, which also names it in a run folder of several tasks.
        dequantize: Read quantized weights as floats; they are refused otherwise.

    Raises:
        ValueError: If there is no such thing, it is in no known format, or it has no exact delta.
    """
    path = locate(name)
    for reader in READERS:
        if reader.opens(path):
            return reader.open(path, task, dequantize)
    raise ValueError(f"{name} is in no format that can be merged; expected {_listed(READERS)}.")


def open_base(name: str, dequantize: bool = False) -> BaseModel:
    """Opens the base.

    Args:
        name: A folder, a file, ``package:…`` or a hub name.
        dequantize: Read quantized weights as floats; they are refused otherwise.

    Raises:
        ValueError: If there is no such thing, or it does not hold all weights of a model.
    """
    path = locate(name)
    reader = next((reader for reader in READERS if reader.opens(path)), None)
    wanted = [reader for reader in READERS if issubclass(reader, WeightsInput)]
    if reader is None:
        raise ValueError(f"The base {name} is in no known format; expected {_listed(wanted)}.")
    if not issubclass(reader, WeightsInput):
        raise ValueError(f"The base {name} is {reader.format}; expected the model that all tasks started from.")
    try:
        found = reader.open(path, "", dequantize)
    except ValueError as error:
        raise ValueError(f"The base cannot be used: {error}") from error
    return BaseModel(name, found.folder, found.tensors)


def _listed(readers: Sequence[type[TaskInput]]) -> str:
    *others, last = [reader.expected for reader in readers]
    return f"{', '.join(others)}, or {last}"
