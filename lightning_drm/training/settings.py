"""The settings of a finetune, flat and comparable, so that a run sees whether a stored task still fits.

Only settings that can change the result count: not the folder, the logging, the progress bars or the hardware. Of
callbacks, those of Lightning count that change what is trained; what a user's own ones do is unknown.
"""

import dataclasses
import enum
import inspect
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
import xxhash
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_drm.deltas import hash_tensor
from lightning_drm.pretrained import public_name

Settings = dict[str, str | int | float | bool | None]

_WITHOUT_INFLUENCE = {
    "accelerator", "barebones", "callbacks", "default_root_dir", "detect_anomaly", "devices", "enable_autolog_hparams",
    "enable_checkpointing", "enable_model_summary", "enable_progress_bar", "inference_mode", "limit_predict_batches",
    "limit_test_batches", "log_every_n_steps", "logger", "model_registry", "num_nodes", "num_sanity_val_steps",
    "plugins", "profiler", "strategy",
}  # fmt: skip
_OF_TRAINING = (
    BaseFinetuning, BatchSizeFinder, EarlyStopping, GradientAccumulationScheduler, LearningRateFinder,
    StochasticWeightAveraging,
)  # fmt: skip
_MEASURED_ONLY = {"metric", "score", "higher_is_better", "max_new_tokens", "num_beams"}
_ADDED = {  # what was so before it was a setting
    "model.trust_remote_code": False,
    "model.kind": None,
    "model.revision": None,
    "model.quantization": None,
    "model.gradient_checkpointing": False,
    "data.trust_remote_code": False,
    "data.kind": None,
    "data.revision": None,
    "data.pretrained_revision": None,
    "data.pad_token": None,
    "weights": "last",
}
_UNTOLD = {  # of these values, older versions kept the type alone
    "numpy.float32", "numpy.int64", "numpy.ndarray", "pathlib.PosixPath", "pathlib.WindowsPath", "torch.Tensor",
    "torch.device", "torch.dtype",
}  # fmt: skip


def finetune_settings(
    model: LightningModule, data: LightningDataModule, trainer: Mapping[str, Any], seed: int
) -> Settings:
    """Everything that decides the outcome of a task's finetune.

    Args:
        model: The task's module; its saved hyper-parameters count.
        data: The task's data module; its saved hyper-parameters count.
        trainer: Arguments of the Trainer.
        seed: The seed that everything was drawn from.

    Returns:
        Dotted name to plain value.
    """
    defaults = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items()}
    chosen = {name: v for name, v in trainer.items() if name not in _WITHOUT_INFLUENCE and v != defaults.get(name)}
    trained = {name: value for name, value in data.hparams.items() if name not in _MEASURED_ONLY}
    content = {
        "model": {"class": type(model).__qualname__, **model.hparams},
        "data": {"class": type(data).__qualname__, **trained},
        "trainer": chosen,
        "seed": seed,
    }
    return {name: _without_path(value) for name, value in flatten(content)}


def callback_settings(callbacks: Sequence[Callback], *, averaged: bool) -> Settings:
    """What the callbacks of a fit add to its settings.

    Args:
        callbacks: The callbacks, before they were used.
        averaged: Whether the merged weights are those that a callback averages.
    """
    counted = (*_OF_TRAINING, WeightAveraging) if averaged else _OF_TRAINING
    found: dict[str, Callback] = {}
    for callback in callbacks:
        if isinstance(callback, counted):
            name = type(callback).__name__
            found[f"{name}_{len(found)}" if name in found else name] = callback
    content: Settings = {"callbacks": ", ".join(found) or "none"}
    for name, callback in found.items():
        own = {key.lstrip("_"): value for key, value in vars(callback).items() if key != "_device"}
        own |= own.pop("kwargs", {})
        if inspect.isfunction(rule := own.get("avg_fn")):  # of an exponential average, whose decay is only known to it
            own["avg_fn"] = {"name": _name(rule), **inspect.getclosurevars(inspect.unwrap(rule)).nonlocals}
        content |= flatten(own, f"callbacks.{name}")
    return {name: _without_path(value) for name, value in content.items()}


def changed_settings(stored: Mapping[str, object], current: Mapping[str, object]) -> list[str]:
    """What has changed, one line a setting: ``model.head_lr: 0.01 → 0.001``."""
    current = {name: _without_path(value) for name, value in current.items()}
    added = {name: value for name, value in _ADDED.items() if name in current}
    stored = added | {name: _without_path(value) for name, value in stored.items()}  # older versions kept paths
    if "callbacks" not in stored:  # but not what callbacks do
        current = {name: value for name, value in current.items() if not name.startswith("callbacks")}
    alone = {name for name in stored.keys() ^ current.keys() if name.startswith("callbacks.")}  # of one come or gone
    names = sorted((stored.keys() | current.keys()) - alone)
    absent = "not set"
    return [
        f"{name}: {stored.get(name, absent)} → {current.get(name, absent)}"
        for name in names
        if stored.get(name, absent) not in (current.get(name, absent), *_UNTOLD)
    ]


def _without_path(value: Any) -> Any:
    """A setting as the task's file keeps it: of a path, the last part, and a hash that tells it from other paths.

    Task folders are handed on. Where the base and the data lie is in the run's ``config.yaml`` alone.
    """
    if not isinstance(value, str) or not value or (name := public_name(value)) == value:  # "" would be this folder
        return value
    return f"{name} ({xxhash.xxh3_64(value.encode()).hexdigest()[:8]})"


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted name and a plain value."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return [
            pair
            for key, item in value.items()
            if not str(key).startswith("_")  # Lightning notes there how it made an object
            for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, str | bool | int | float) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, np.generic):
        item = value.item()
        return item if isinstance(item, str | bool | int | float) else str(value)
    if isinstance(value, torch.Tensor):
        return hash_tensor(value.detach().cpu())
    if isinstance(value, np.ndarray):  # whose bytes, if it holds objects, are their places in memory
        return xxhash.xxh3_128(f"{value.dtype} {_plain(value.tolist())}".encode()).hexdigest()
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return str([_plain(item) for item in value])
    if isinstance(value, Set):
        return str(sorted(map(str, value)))
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        return {"class_path": _name(value.func), **value.keywords}
    return _name(value)


def _name(value: Any) -> str:
    """A name that is the same in every process, which ``repr`` with its addresses is not."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
