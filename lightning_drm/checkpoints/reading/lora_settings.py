"""What an adapter's configuration says of its factors: that their product is the delta, its scaling and its ranks.

A LoRA adapter's delta is ``s · B A``; the scaling ``s`` follows from the configuration exactly as peft computes it.
Any other field of a configuration may change that formula, the base or the layers. So every field that is not known to
keep the delta exact must have its default value; another value is refused by the field's name, in future variants, too.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_drm.checkpoints.reading.module_patterns import matched_keys
from lightning_drm.deltas.lora import INITS_KEEPING_THE_BASE
from lightning_drm.storage.json_files import shown

_EXACT_FIELDS = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config",
    "eva_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
    "target_parameters",
}  # fmt: skip
_NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA"}


def wrong_settings(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter's delta would not be exactly ``s · B A``, or ``s`` is not known.

    Args:
        config: What ``adapter_config.json`` holds.

    Returns:
        One clause for each reason, with the name of the variant or the field.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{shown(kind) if not isinstance(kind, str) else kind} adapters are not supported; only LoRA is"]
    return [*_inexact_settings(config), *_wrong_values(config)]


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """By module, the factor ``s`` of its product, as peft computes it.

    Args:
        config: A configuration without `wrong_settings`.
        ranks: By module, the rank of its factors.

    Raises:
        ValueError: If the configuration gives a module another rank than its factors have, or a pattern cannot be
            matched.
    """
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank_keys = matched_keys(rank_pattern, ranks, "rank_pattern")
    alpha_keys = matched_keys(alpha_pattern, ranks, "alpha_pattern")
    different, found = [], {}
    for module, rank in ranks.items():
        key = rank_keys.get(module)
        expected = _default(config, "r") if key is None else rank_pattern[key]
        if rank != expected:
            field = "r" if key is None else f"rank_pattern {shown(key)}"
            different.append(f"{module} has rank {rank}, but {field} says {expected}")
        alpha = alpha_pattern[alpha_keys[module]] if module in alpha_keys else _default(config, "lora_alpha")
        found[module] = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if different:
        more = f"; so do {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(f"{'; '.join(different[:3])}{more}")
    return found


def ranks_of(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, int]:
    """By module, the rank that the configuration gives it.

    Args:
        config: A configuration without `wrong_settings`.
        modules: Names of modules, or of parameters that have an adapter of their own.

    Raises:
        ValueError: If a pattern cannot be matched.
    """
    modules, patterns = list(modules), config.get("rank_pattern") or {}
    keys = matched_keys(patterns, modules, "rank_pattern")
    return {module: patterns[keys[module]] if module in keys else _default(config, "r") for module in modules}


def _inexact_settings(config: Mapping[str, Any]) -> list[str]:
    from peft import LoraConfig

    defaults = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(LoraConfig)
    }
    problems = []
    for name, value in config.items():
        if name == "init_lora_weights":
            if not (value is None or isinstance(value, bool | str)) or value not in INITS_KEEPING_THE_BASE:
                problems.append(f"init_lora_weights={shown(value)} changes the base weights, so the delta is unknown")
        elif name not in _EXACT_FIELDS and value and value != defaults.get(name):
            variant = _NAMES.get(name, name)
            problems.append(f"{variant} ({name}={shown(value)}) is not W + s·B·A, so it has no exact delta")
    return problems


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    """The fields that the scaling follows from, where their values make no sense."""
    problems = []
    if not _is_rank(_default(config, "r")):
        problems.append(f"r must be a whole number of at least 1, got {shown(config['r'])}")
    if not _is_finite_number(_default(config, "lora_alpha")):
        problems.append(f"lora_alpha must be a finite number, got {shown(config['lora_alpha'])}")
    targets = config.get("target_parameters")
    if targets is not None and not (
        isinstance(targets, list | set | tuple) and all(isinstance(t, str) for t in targets)
    ):
        problems.append(f"target_parameters must be a list of names, got {shown(targets)}")
    if not isinstance(config.get("use_rslora", False), bool):
        problems.append(f"use_rslora must be true or false, got {shown(config['use_rslora'])}")
    for name, fits, what in (
        ("rank_pattern", _is_rank, "a whole number of at least 1"),
        ("alpha_pattern", _is_finite_number, "a finite number"),
    ):
        patterns = config.get(name)
        if patterns is None:
            continue
        if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
            problems.append(f"{name} must give a number for each name, got {shown(patterns)}")
            continue
        problems += [
            f"{name} must give {what} for {shown(key)}, got {shown(value)}"
            for key, value in patterns.items()
            if not fits(value)
        ][:3]
    return problems


def _default(config: Mapping[str, Any], name: str) -> Any:
    """A field's value; peft's default where an old or shortened configuration leaves it out."""
    return config.get(name, 8)  # of both r and lora_alpha


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
