"""LoRA as exact deltas: PEFT adapter folders, and what they have in common with other files of LoRA factors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.lora_settings import ranks_of, scalings, wrong_settings
from lightning_drm.checkpoints.reading.target_parameters import adapted_parameters, plain_module
from lightning_drm.checkpoints.reading.task_input import Entry, TaskInput
from lightning_drm.checkpoints.reading.tensors import CONTAINERS, Tensors
from lightning_drm.deltas import Kind
from lightning_drm.deltas.adapters import CONFIG_FILE
from lightning_drm.deltas.lora import expert_factors
from lightning_drm.merging import Delta, LowRank
from lightning_drm.storage.json_files import read_object, shown

_PREFIX = "base_model.model."
_SIDE = re.compile(r"(?<=\.lora_)(embedding_)?([AB])(?=$|\.)")


class LoraInput(TaskInput):
    """Parameters that are stored as LoRA factors, and others that are stored as they are.

    Args:
        path: The file or folder.
        tensors: The factors and values.
        config: The fields of the ``LoraConfig``.
        folder: The folder with the configuration, if it is one.

    Raises:
        ValueError: If the adapter has no exact delta, naming every reason.
    """

    def __init__(self, path: Path, tensors: Tensors, config: Mapping[str, Any], folder: Path | None = None) -> None:
        super().__init__(path, tensors.files, folder)
        self.config, self._tensors = config, tensors
        self.ignored = tensors.ignored
        _refuse(path if folder is None else folder / CONFIG_FILE, [*wrong_settings(config), *self._wrong_fields()])
        self._factors: dict[str, tuple[str, str]] = {}
        self._ranks: dict[str, int] = {}
        self._scalings: dict[str, float] = {}
        self._values: dict[str, str] = {}
        self._frozen: dict[str, str] = {}
        self._num_experts: dict[str, int] = {}
        self._unresolved: dict[str, str] = {}
        self._problems: list[str] = []

    def _wrong_fields(self) -> list[str]:
        """What is wrong with further fields of the configuration, for subclasses that read some."""
        return []

    @property
    @override
    def is_mapped(self) -> bool:
        return self._tensors.is_mapped  # factors are read once for all pieces

    def _add_value(self, name: str, raw: str) -> None:
        """Takes in a value; that of an adapted weight is what the weight was before, which peft saves of embeddings."""
        if name in self._factors:
            self._frozen[name] = raw
            return
        header = self._tensors.headers[raw]
        self._values[name] = raw
        self.entries[name] = Entry(header.shape, header.dtype)

    def _add_factor(self, module: str, raw: str) -> None:
        """Takes in one factor of a layer, which must have the other one, too."""
        side, partner = _side(raw), _partner(raw)
        other = "B" if side[2] == "A" else "A"
        if partner not in self._tensors.headers:
            self._problems.append(f"{module} has a lora_{side[2]} but no lora_{other}")
        elif side[2] == "A" and self.config.get("target_parameters"):
            self._unresolved[module] = raw
        elif side[2] == "A":
            self._add_layer(module, raw, partner, is_embedding=side[1] is not None)

    def resolve(self, kinds: Mapping[str, Kind], *, in_order: bool) -> None:
        """Completes `entries` by what only the base tells: which experts an adapter's factors are for.

        Args:
            kinds: By name, what each of the base's parameters is to its layer.
            in_order: Whether they are in the order in which the model's class makes them.

        Raises:
            ValueError: If the finetune does not fit the base.
        """
        if not self._unresolved:
            return
        targets, layers = list(self.config["target_parameters"]), dict[str, list[str]]()
        for module in self._unresolved:
            layers.setdefault(plain_module(module), []).append(module)
        found: dict[str, str] = {}
        for layer, wrapped in layers.items():
            try:
                of_layer = adapted_parameters(layer, wrapped, targets, kinds, in_order=in_order)
            except ValueError as error:
                self._problems.append(str(error))
                continue
            found |= {name: self._unresolved[module] for module, name in of_layer.items()}
            if not of_layer:
                raw = self._unresolved[layer]
                self._add_layer(layer, raw, _partner(raw), is_embedding="_embedding_A" in raw)
        unused = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in found)]
        if unused:
            self._problems.append(
                f"target_parameters names {', '.join(unused)}, but no experts of the base have that name"
            )
        ranks = ranks_of(self.config, found)
        for name, raw in found.items():
            self._add_experts(name, raw, ranks[name])
        self._require_agreement()

    def _add_experts(self, name: str, raw_a: str, rank: int) -> None:
        """Takes in the factors of all experts of a layer, which stand side by side."""
        raw_b = _partner(raw_a)
        header_a, header_b = self._tensors.headers[raw_a], self._tensors.headers[raw_b]
        a, b = header_a.shape, header_b.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
            self._problems.append(
                f"{name} has factors of shapes {a} and {b}, which are none of experts with rank {rank}"
            )
            return
        if not (header_a.dtype.is_floating_point and header_b.dtype.is_floating_point):
            self._problems.append(f"{name} has factors in {header_a.dtype} and {header_b.dtype}, which are not floats")
            return
        self._factors[name], self._ranks[name], self._num_experts[name] = (raw_a, raw_b), rank, a[0] // rank
        self._freeze(name)
        self.entries[name] = Entry((a[0] // rank, b[0], a[1]), header_a.dtype, "low_rank_linear", rank)

    def _add_layer(self, module: str, raw_a: str, raw_b: str, is_embedding: bool) -> None:
        header_a, header_b = self._tensors.headers[raw_a], self._tensors.headers[raw_b]
        a, b, dtype = header_a.shape, header_b.shape, header_a.dtype
        is_conv = len(a) > 2 and not is_embedding
        if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or (set(b[2:]) > {1} if is_conv else len(a) > 2):
            self._problems.append(f"{module} has factors of shapes {a} and {b}, which have no product")
            return
        if not (dtype.is_floating_point and header_b.dtype.is_floating_point):
            self._problems.append(f"{module} has factors in {dtype} and {header_b.dtype}, which are not floats")
            return
        name = f"{module}.weight"
        self._factors[name], self._ranks[module] = (raw_a, raw_b), a[0]
        self._freeze(name)
        if is_embedding:
            self.entries[name] = Entry((a[1], b[0]), dtype, "low_rank", a[0])
        elif is_conv:
            self.entries[name] = Entry((b[0], *a[1:]), dtype, "delta")
        else:
            self.entries[name] = Entry((b[0], a[1]), dtype, "low_rank_linear", a[0])

    def _freeze(self, name: str) -> None:
        if name in self._values:
            self._frozen[name] = self._values.pop(name)

    @override
    def base_value(self, name: str) -> Tensor | None:
        return self._tensors.read(self._frozen[name]) if name in self._frozen else None

    def _require_agreement(self) -> None:
        """Refuses factors that do not fit each other or the configuration; to be called when all are taken in."""
        _refuse(self.files[0], self._problems)
        try:
            self._scalings = scalings(self.config, self._ranks)
        except ValueError as error:
            config = "its LoraConfig" if self.folder is None else CONFIG_FILE
            raise ValueError(f"{self.path}: {config} does not agree with its factors: {error}.") from error

    @override
    def read(self, name: str) -> Delta:
        if name in self._values:
            return self._tensors.read(self._values[name])
        raw_a, raw_b = self._factors[name]
        a, b = self._tensors.read(raw_a).float(), self._tensors.read(raw_b).float()
        scaling = self._scalings[name if name in self._num_experts else name.removesuffix(".weight")]
        if "_embedding_A" in raw_a:
            return LowRank(a.T.contiguous(), (b * scaling).T.contiguous())
        if name in self._num_experts:
            return expert_factors(a, b * scaling, self._num_experts[name])
        if a.dim() == 2:
            return LowRank(b * scaling, a)
        return ((b.flatten(1) * scaling) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


class AdapterInput(LoraInput):
    """A folder that ``PeftModel.save_pretrained`` wrote.

    Args:
        path: The folder.

    Raises:
        ValueError: If the adapter has no exact delta, naming every reason, or its tensors are not those of LoRA.
    """

    format = "an adapter"
    expected = "a PEFT adapter folder (adapter_config.json)"

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        return (path / CONFIG_FILE).is_file()

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        return cls(path)

    def __init__(self, path: Path) -> None:
        super().__init__(path, _tensors(path), read_object(path / CONFIG_FILE), path)
        self.base_name = self.config.get("base_model_name_or_path") or None
        self._read_headers()
        self._require_agreement()

    @override
    def _wrong_fields(self) -> list[str]:
        from peft import TaskType

        problems = []
        name, kind = self.config.get("base_model_name_or_path"), self.config.get("task_type")
        if not isinstance(name, str | None):
            problems.append(f"base_model_name_or_path must be a name, got {shown(name)}")
        if kind is not None and kind not in list(TaskType):
            problems.append(f"task_type must be one of {', '.join(TaskType)}, got {shown(kind)}")
        return problems

    def _read_headers(self) -> None:
        for raw in self._tensors.headers:
            name = raw.removeprefix(_PREFIX)
            if ".lora_magnitude_vector" in name:
                self._problems.append("holds DoRA magnitudes, which are not plain LoRA")
            elif name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")):
                self._add_factor(name.rpartition(".lora_")[0], raw)
            elif ".lora_" in name:
                self._problems.append(f"holds {name}, which is not plain LoRA")
            else:  # a bias that was trained, or a module of modules_to_save: its whole value
                self._add_value(plain_module(name), raw)


def _side(raw: str) -> re.Match[str]:
    side = _SIDE.search(raw)
    assert side is not None, f"{raw} is no factor"
    return side


def _partner(raw: str) -> str:
    """The name of the other factor."""
    side = _side(raw)
    return f"{raw[: side.start(2)]}{'B' if side[2] == 'A' else 'A'}{raw[side.end(2) :]}"


def _tensors(path: Path) -> Tensors:
    for container in CONTAINERS:
        if (path / container.adapter_file).is_file():
            return container([path / container.adapter_file])
    files = " nor ".join(container.adapter_file for container in CONTAINERS)
    raise ValueError(f"{path} has an {CONFIG_FILE}, but neither {files}.")


def _refuse(file: Path, problems: Sequence[str]) -> None:
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f"; and {len(problems) - 5} more like these" if len(problems) > 5 else ""
        raise ValueError(f"{file}: {'; '.join(problems[:5])}{more}.")
