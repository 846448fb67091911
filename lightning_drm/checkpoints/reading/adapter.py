"""LoRA as exact deltas: PEFT adapter folders, and what they have in common with other files of LoRA factors.

A LoRA adapter's delta is ``s · B A``; the scaling ``s`` follows from the configuration exactly as peft computes it.
Any other field of a configuration may change that formula, the base or the layers. So every field that is not known to
keep the delta exact must have its default value; another value is refused by the field's name, in future variants, too.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from typing_extensions import override

from lightning_drm.checkpoints.reading.task_input import Entry, TaskInput
from lightning_drm.checkpoints.reading.tensors import CONTAINERS, Tensors
from lightning_drm.deltas.lora import INITS_KEEPING_THE_BASE
from lightning_drm.merging import Delta, LowRank

CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_EXACT_FIELDS = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config",
    "eva_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA"}


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
        problems = inexact_settings(config)
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}.")
        super().__init__(path, tensors.files, folder)
        self.config, self._tensors = config, tensors
        self._factors: dict[str, tuple[str, str]] = {}
        self._values: dict[str, str] = {}

    @property
    @override
    def is_mapped(self) -> bool:
        return self._tensors.is_mapped  # factors are read once for all pieces

    def _add_value(self, name: str, raw: str) -> None:
        header = self._tensors.headers[raw]
        self._values[name] = raw
        self.entries[name] = Entry(header.shape, header.dtype)

    def _add(self, module: str, raw_a: str, raw_b: str) -> None:
        headers = self._tensors.headers
        if raw_b not in headers:
            raise ValueError(f"{self.path}: {module} has a lora_A but no lora_B.")
        a, b = headers[raw_a].shape, headers[raw_b].shape
        name = f"{module}.weight"
        self._factors[name] = (raw_a, raw_b)
        if "_embedding_A" in raw_a:
            entry = Entry((a[1], b[0]), headers[raw_a].dtype, "low_rank", a[0])
        elif len(a) == 2:
            entry = Entry((b[0], a[1]), headers[raw_a].dtype, "low_rank_linear", a[0])
        else:
            entry = Entry((b[0], *a[1:]), headers[raw_a].dtype, "delta")
        self.entries[name] = entry

    def scaling(self, name: str, rank: int) -> float:
        """The factor ``s`` of a layer's product, as peft computes it.

        Args:
            name: The weight's name.
            rank: The layer's rank.
        """
        from peft.utils.other import get_pattern_key

        module = name.removesuffix(".weight")
        patterns: Mapping[str, float] = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @override
    def read(self, name: str) -> Delta:
        if name in self._values:
            return self._tensors.read(self._values[name])
        raw_a, raw_b = self._factors[name]
        a, b = self._tensors.read(raw_a).float(), self._tensors.read(raw_b).float()
        scaling = self.scaling(name, a.shape[0])
        if "_embedding_A" in raw_a:
            return LowRank(a.T.contiguous(), (b * scaling).T.contiguous())
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
        super().__init__(path, _tensors(path), json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")), path)
        self.base_name = self.config.get("base_model_name_or_path") or None
        self._read_headers()

    def _read_headers(self) -> None:
        unknown = []
        for raw in self._tensors.headers:
            name = raw.removeprefix(_PREFIX)
            if ".lora_magnitude_vector" in name:
                unknown.append("DoRA magnitudes")
            elif name.endswith(".lora_A.weight"):
                self._add(name.removesuffix(".lora_A.weight"), raw, raw.replace(".lora_A.", ".lora_B."))
            elif name.endswith(".lora_embedding_A"):
                self._add(name.removesuffix(".lora_embedding_A"), raw, raw.replace("_embedding_A", "_embedding_B"))
            elif name.endswith((".lora_B.weight", ".lora_embedding_B")):
                continue
            elif ".lora_" in name:
                unknown.append(name)
            else:  # a bias that was trained, or a module of modules_to_save: its whole value
                self._add_value(name.replace(".base_layer.", "."), raw)
        if unknown:
            raise ValueError(f"{self.path}: holds {', '.join(unknown[:5])}, which is not plain LoRA.")


def inexact_settings(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter's delta would not be exactly ``s · B A``.

    Args:
        config: What ``adapter_config.json`` holds.

    Returns:
        One clause for each reason, with the name of the variant or the field.
    """
    from peft import LoraConfig

    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{kind} adapters are not supported; only LoRA is"]
    defaults = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(LoraConfig)
    }
    problems = []
    for name, value in config.items():
        if name == "init_lora_weights":
            if value not in INITS_KEEPING_THE_BASE:
                problems.append(f"init_lora_weights={value!r} changes the base weights, so the delta is unknown")
        elif name not in _EXACT_FIELDS and value and value != defaults.get(name):
            variant = _NAMES.get(name, name)
            problems.append(f"{variant} ({name}={value!r}) is not W + s·B·A, so it has no exact delta")
    return problems


def _tensors(path: Path) -> Tensors:
    for container in CONTAINERS:
        if (path / container.adapter_file).is_file():
            return container([path / container.adapter_file])
    files = " nor ".join(container.adapter_file for container in CONTAINERS)
    raise ValueError(f"{path} has an {CONFIG_FILE}, but neither {files}.")
