"""What a configuration says of a model's parameters, without weights: the model is built on torch's meta device."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lightning_drm.checkpoints.architecture.alignment import Alignment
from lightning_drm.checkpoints.architecture.experts import ExpertFiles, ExpertPart
from lightning_drm.deltas import Kind, backbone_parameters, embedding_layer, guess_kind, transposed_names
from lightning_drm.storage.json_files import field as field_of
from lightning_drm.storage.json_files import read_object, shown

_LARGEST_COUNT = 1_000_000
_FEWEST_MODULES, _MODULES_PER_TENSOR = 10_000, 20  # a file may hold a whole layer's experts in one tensor
_LONGEST_REASON = 200
_TASK_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "Regression")


@dataclass(frozen=True)
class Architecture:
    """Facts about a model's parameters; empty where nothing is known, and then shapes and names have to do.

    Attributes:
        name: The model's class.
        kinds: By name, what each parameter is to its layer.
        ties: By the name of a tied tensor, the name of the one that is stored.
        transposed: Names of the linear weights that are stored (in, out), and of such experts' weights.
        vocabulary: Names of the parameters with one row for each token.
        backbone: Prefix of the part that the tasks share; empty if they share everything.
        live_name: From a tensor's name in a file to the live model's, since transformers renames some.
        files: From the live model's names to the file's, where they differ; known after `named_like`.
        experts: By the name of a tensor of a file, the part of the live model's weight with experts that it may hold.
    """

    name: str = "a model without a known architecture"
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    backbone: str = ""
    live_name: Callable[[str], str] = str
    files: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, ExpertPart] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether a configuration was found and understood."""
        return bool(self.kinds)

    @classmethod
    def of_folder(cls, folder: Path | None, num_tensors: int) -> "Architecture":
        """Reads ``config.json``; custom code in the folder is not run.

        Args:
            folder: A model's folder.
            num_tensors: How many tensors its files hold, which says how large the model can be.

        Raises:
            ValueError: If the configuration is damaged: it is of a model that transformers knows, but makes none.
        """
        if folder is None or not (folder / "config.json").is_file():
            return cls()
        file = folder / "config.json"
        content = read_object(file)
        _refuse_absurd_counts(content, file)
        kind = field_of(content, "model_type", str, str(file), "")
        named = field_of(content, "architectures", list, str(file), [])
        if kind not in CONFIG_MAPPING:
            return cls()
        level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            model = _meta_model(folder, named, num_tensors)
        except ImportError:  # a library that this architecture needs is not here
            return cls()
        except Exception as error:  # a damaged value fails wherever it is first used, and in any way
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ValueError(f"{file} does not describe a {kind} model: {type(error).__name__}: {reason}") from error
        finally:
            logging.getLogger("transformers").setLevel(level)
        return cls.of_model(model) if model is not None else cls()

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "Architecture":
        """Reads the structure of a model, which may be on the meta device."""
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        vocabulary = set()
        inputs = embedding_layer(model.get_input_embeddings)
        embeddings = (inputs, embedding_layer(model.get_output_embeddings))
        for layer in embeddings:
            owned = [name for name, child in model.named_modules(remove_duplicate=False) if child is layer and name]
            vocabulary |= {f"{name}.{part}" for name in owned for part in ("weight", "bias")}
        vocabulary |= {ties[name] for name in vocabulary & ties.keys()}
        parameters = backbone_parameters(model, [])
        transposed = transposed_names(model, parameters)
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        saved = ExpertFiles.of_model(model, [name for name, kind in kinds.items() if kind == "experts"])
        kinds |= dict.fromkeys(sorted(saved.whole), "experts")
        has_tokens = inputs is not None
        return cls(
            type(model).__name__,
            kinds,
            ties,
            frozenset(transposed),
            frozenset(vocabulary & kinds.keys()) if has_tokens else frozenset(),
            _backbone_prefix(model),
            _renaming(model),
            experts=saved.parts,
        )

    def named_like(self, names: set[str]) -> "Architecture":
        """The same facts, under the names that a file uses."""
        if not self.known:
            return self
        files = {live: name for name in names if (live := self.live_name(name)) != name}
        align = Alignment.between(self.kinds, names | files.keys())

        def rename(name: str) -> str:
            return files.get(align(name), align(name))

        return Architecture(
            self.name,
            {rename(name): kind for name, kind in self.kinds.items()},
            {rename(tied): rename(source) for tied, source in self.ties.items()},
            frozenset(map(rename, self.transposed)),
            frozenset(map(rename, self.vocabulary)),
            self.backbone.removeprefix(align.strip) and align.add + self.backbone.removeprefix(align.strip),
            self.live_name,
            files,
            {align(name): replace(part, stack=rename(part.stack)) for name, part in self.experts.items()},
        )

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """What a parameter is to its layer: known from the layer, or else guessed from name and shape."""
        return self.kinds.get(name) or guess_kind(name, shape)


def _meta_model(folder: Path, named: list[Any], num_tensors: int) -> PreTrainedModel | None:
    """The model without values; ``None`` if transformers has no class for it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model_class = getattr(transformers, str(named[0]), None) if named else None
    with torch.device("meta"), _bounded(_FEWEST_MODULES + _MODULES_PER_TENSOR * num_tensors):
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            return model_class(config)
        if type(config) not in MODEL_MAPPING:
            return None
        built: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)
        return built


@contextmanager
def _bounded(num_modules: int) -> Iterator[None]:
    """Stops making a model of absurdly many layers, which a damaged number asks for, before it fills the memory."""
    count = 0

    def register(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > num_modules:
            raise ValueError(f"it would have more than {num_modules:,} layers and parts of layers")

    handle = register_module_module_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _refuse_absurd_counts(content: Mapping[str, Any], file: Path) -> None:
    """Refuses what transformers would fill the memory with before it makes a model, such as names for all labels."""
    for name, value in content.items():
        if name.startswith("num_") and isinstance(value, int) and value > _LARGEST_COUNT:
            raise ValueError(f"{file}: expected at most {_LARGEST_COUNT:,} for {name}, got {shown(value)}.")


def _backbone_prefix(model: PreTrainedModel) -> str:
    if not any(part in type(model).__name__ for part in _TASK_HEADS):
        return ""
    prefix = model.base_model_prefix
    if not isinstance(getattr(model, prefix, None), nn.Module):
        sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
        prefix = max(sizes, key=lambda name: sizes[name])
    return f"{prefix}."


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """How transformers renames a file's tensors as it loads them; those that it also converts keep their names here."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()

    def live_name(name: str) -> str:
        live, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return live if converted is None and live in state else name

    return live_name
