"""A checkpoint of a module that peft injected LoRA into: frozen weights, factors and trained values in one state dict.

No tensor holds the factors' scaling. It follows from the ``LoraConfig``, which `TransformerTask` and every other module
that calls ``save_hyperparameters`` keep in the checkpoint. It is read from there as plain values; nothing in the file
is executed. The frozen weights show whether the adapter was trained on the base that it is merged into.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from typing_extensions import override

from lightning_drm.checkpoints.reading.adapter import LoraInput
from lightning_drm.checkpoints.reading.inert_pickle import Placeholder, parts_of
from lightning_drm.checkpoints.reading.target_parameters import plain_module
from lightning_drm.checkpoints.reading.tensors import Tensors, container_of, plain_name

_KINDS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".modules_to_save.")
_TELLING = {"r", "lora_alpha", "target_modules"}  # a dictionary with these fields is a LoraConfig's


class LoraCheckpoint(LoraInput):
    """A checkpoint with LoRA layers.

    Args:
        path: The file.
        tensors: Its tensors.

    Raises:
        ValueError: If the scaling is not known, there is more than one adapter, or it has no exact delta.
    """

    format = "a checkpoint with LoRA"
    expected = "a checkpoint file of a module with LoRA"
    whole = True

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        container = container_of(path) if path.is_file() else None
        return container is not None and any(
            ".lora_" in name or ".base_layer." in name for name in container([path]).headers
        )

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        container = container_of(path)
        assert container is not None, f"{path} is not a file of tensors"
        return cls(path, container([path]))

    def __init__(self, path: Path, tensors: Tensors) -> None:
        super().__init__(path, tensors, _config(path, tensors.hyperparameters()))
        self.ignored = tensors.ignored - {"LoraConfig"}
        names = {raw: plain_name(raw).replace("base_model.model.", "", 1) for raw in tensors.headers}
        adapters = {name.split(kind)[1].split(".")[0] for name in names.values() for kind in _KINDS if kind in name}
        if len(adapters) != 1:
            found = (
                f"the adapters {', '.join(sorted(adapters))}" if adapters else "adapted layers without LoRA's factors"
            )
            raise ValueError(f"{path} holds {found}; expected one LoRA adapter.")
        self._sort(names, adapters.pop())
        self._require_agreement()

    def _sort(self, names: Mapping[str, str], adapter: str) -> None:
        adapted = {name.split(".lora_")[0] for name in names.values() if ".lora_" in name}
        saved = {name.split(".modules_to_save.")[0] for name in names.values() if ".modules_to_save." in name}
        for raw, name in names.items():
            module, _, kind = name.partition(".lora_")
            if kind in {f"{side}.{adapter}.weight" for side in "AB"} | {f"embedding_{side}.{adapter}" for side in "AB"}:
                self._add_factor(module, raw)
            elif kind:
                raise ValueError(f"{self.path}: holds {name}, which is not plain LoRA.")
            elif any(name == f"{module}.base_layer.weight" for module in adapted):
                self._frozen[name.replace(".base_layer.", ".")] = raw
            elif not any(name.startswith(f"{module}.original_module.") for module in saved):
                own = plain_module(name.replace(f".modules_to_save.{adapter}.", "."))
                if self._tensors.headers[raw].dtype.is_floating_point:
                    self._add_value(own, raw)


def _config(path: Path, hyperparameters: object) -> dict[str, Any]:
    found = list(_configs(hyperparameters))
    if not found:
        raise ValueError(
            f"{path} holds LoRA layers, but its hyper-parameters hold no LoraConfig that gives their scaling; save it "
            "with save_hyperparameters, save the adapter with peft's save_pretrained, or merge from the run folder."
        )
    if any(config != found[0] for config in found):
        raise ValueError(f"{path} holds {len(found)} different LoraConfigs; expected one.")
    for field in ("alpha_pattern", "rank_pattern"):
        patterns = found[0].get(field)
        anchored = [key for key in patterns if str(key).startswith("^")] if isinstance(patterns, Mapping) else []
        if anchored:
            raise ValueError(
                f"{path}: {field} {anchored[0]!r} starts at the module that got the adapter, which a checkpoint does "
                "not name; save the adapter with peft's save_pretrained, or merge from the run folder."
            )
    return found[0]


def _configs(hyperparameters: object) -> Iterable[dict[str, Any]]:
    """Every LoraConfig in some hyper-parameters: the object itself, or its fields from a configuration file."""
    from peft import LoraConfig

    for value in parts_of(hyperparameters):
        if isinstance(value, Placeholder):
            if value.kind == "LoraConfig":
                yield {**value.state, "peft_type": "LORA"}
        elif isinstance(value, LoraConfig):
            yield {item.name: getattr(value, item.name) for item in dataclasses.fields(value)} | {"peft_type": "LORA"}
        elif isinstance(value, Mapping) and value.keys() >= _TELLING:
            yield {**value, "peft_type": "LORA"}
        elif isinstance(value, Mapping) and str(value.get("class_path")).endswith(".LoraConfig"):
            fields = value.get("init_args")
            if isinstance(fields, Mapping) and not fields.keys() >= _TELLING:  # which come by themselves
                yield {**fields, "peft_type": "LORA"}
