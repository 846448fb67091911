"""The merged model on disk: a folder that ``from_pretrained`` loads, every task's head, and a model card.

On a quantized base, what is merged is an adapter, and peft loads the folder.

Where batch norms have statistics of their own for each task, they have a file beside the head's. The backbone's file
then has those of all tasks together.

The folder is written beside its place and moved there when it is whole.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_drm.deltas import backbone_parameters, load_tensors, remove_wrappers
from lightning_drm.deltas.adapters import CONFIG_FILE, write_factors
from lightning_drm.merging import LowRank
from lightning_drm.storage import write_tensors, written_whole

MODEL_FILE = "model.safetensors"
DESCRIPTION = "module"  # in a head's metadata

_STATISTICS = "batch_norm"


@runtime_checkable
class SavesBackbone(Protocol):
    """A module that knows its backbone's own file format."""

    def save_backbone(self, folder: Path) -> None:
        """Writes the backbone into a folder."""
        ...

    def load_backbone(self, folder: Path) -> None:
        """Reads the backbone from a folder."""
        ...


@runtime_checkable
class SavesProcessor(Protocol):
    """A module that knows what prepares its inputs."""

    def save_processor(self, folder: Path) -> None:
        """Writes a tokenizer or an image processor into a folder."""
        ...


@runtime_checkable
class Described(Protocol):
    """A module that says what it can be built of again, so that a merged model loads without its author's code."""

    def description(self) -> dict[str, Any] | None:
        """Its settings, in JSON's types; ``None`` where they are not enough."""
        ...


def write_merged(
    folder: Path,
    module: nn.Module,
    head: tuple[str, ...],
    heads: Mapping[str, Mapping[str, Tensor]],
    card: str,
    finish: Callable[[Path], None] = lambda partial: None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    factors: Mapping[str, LowRank] | None = None,
) -> None:
    """Writes a merged model.

    Args:
        folder: The folder; replaced if it exists.
        module: A task's module that holds the merged backbone. One that has `SavesBackbone`'s methods writes its
            backbone itself; any other is written as one safetensors file of named tensors.
        head: Names of its head.
        heads: By task, its head's tensors by name.
        card: The model card, in Markdown.
        finish: Called with the written folder before it takes its place.
        statistics: By task, the running statistics of its batch norms by name, where it has its own.
        modules: By task, its own module, where it is known. One that is `Described` is described beside its head.
        factors: By name, merged deltas on a quantized base; an adapter is written in place of the backbone.
    """
    own = {task: found for task, one in (modules or {}).items() if (found := _description(one)) is not None}
    with written_whole(folder) as partial:
        partial.mkdir()
        if factors:
            write_factors(partial, module, head, factors)
            if isinstance(module, SavesProcessor):
                module.save_processor(partial)
        elif isinstance(module, SavesBackbone):
            module.save_backbone(partial)
        else:
            tensors = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
            write_tensors(partial / MODEL_FILE, tensors, {"format": "pt"})
        for task, head_tensors in heads.items():
            # One entry: safetensors writes several in any order, and the same merge is to give the same bytes.
            metadata = {DESCRIPTION: json.dumps({"task": task, **own[task]})} if task in own else {"task": task}
            write_tensors(partial / "heads" / f"{task}.safetensors", head_tensors, metadata)
        for task, running in (statistics or {}).items():
            write_tensors(partial / _STATISTICS / f"{task}.safetensors", running, {"task": task})
        (partial / "README.md").write_text(card, encoding="utf-8")
        finish(partial)


def _description(module: nn.Module) -> dict[str, Any] | None:
    return module.description() if isinstance(module, Described) else None


def loading_code(task: str, module: nn.Module) -> str:
    """What loads a task's module from the folder, for the model card.

    Args:
        task: The task's name.
        module: Its module.
    """
    own = "" if _description(module) is not None else f", {type(module).__name__}(…)"
    return f"from lightning_drm import load_merged\n\nmodel = load_merged(folder_or_hub_name, {task!r}{own})"


def read_merged(
    folder: Path, module: nn.Module, head: tuple[str, ...], tasks: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Reads a merged backbone into a module, and the heads. An adapter is left to `read_factors`.

    Args:
        folder: What `write_merged` wrote.
        module: A task's module; its adapters and wrappers are taken out and its backbone is overwritten.
        head: Names of its head.
        tasks: The tasks whose heads are wanted.

    Returns:
        By task, its head's tensors by name.

    Raises:
        FileNotFoundError: If there is no merged model, or one of the heads is missing.
        ValueError: If the merged model's tensors do not fit the module.
    """
    missing = [task for task in tasks if not (folder / "heads" / f"{task}.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no merged model of task {', '.join(missing)}: merge first.")
    remove_wrappers(module)
    if not (folder / CONFIG_FILE).is_file():  # beside an adapter, the base stays as it is
        _read_backbone(folder, module, head)
    return {task: load_tensors(folder / "heads" / f"{task}.safetensors", "a head") for task in tasks}


def _read_backbone(folder: Path, module: nn.Module, head: tuple[str, ...]) -> None:
    if isinstance(module, SavesBackbone):
        try:
            module.load_backbone(folder)
        except SafetensorError as error:
            raise ValueError(f"{folder} holds a damaged model: {error}.") from error
        return
    tensors = load_tensors(folder / MODEL_FILE, "a model")
    parameters = backbone_parameters(module, head)
    misfits = [n for n, p in parameters.items() if n not in tensors or tensors[n].shape != p.tensor.shape]
    if misfits:
        raise ValueError(f"{folder} was made from another model: {', '.join(misfits)} missing or of another shape.")
    for name, parameter in parameters.items():
        parameter.tensor.data.copy_(tensors[name])


def read_statistics(folder: Path, record: Mapping[str, Any] | None) -> dict[str, dict[str, Tensor]]:
    """Reads the running statistics of batch norms.

    Args:
        folder: What `write_merged` wrote.
        record: What the record of the merge says of them; nothing for a model without batch norms.

    Returns:
        By task that has its own, its statistics by name.

    Raises:
        FileNotFoundError: If some are missing.
        ValueError: If a file is damaged.
    """
    tasks = record["tasks"] if record is not None else []
    files = {task: folder / _STATISTICS / f"{task}.safetensors" for task in tasks}
    if missing := [str(file.relative_to(folder)) for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(f"{folder} is damaged: it lacks {', '.join(missing)}; merge again.")
    return {task: load_tensors(file, "batch norm statistics") for task, file in files.items()}
