"""Going on inside a task whose fit was killed, so that the result is that of an undisturbed fit.

Lightning restores weights, optimizers and loops. What it leaves out decides the order of the samples and the dropout:
the states of the random generators. They are kept in every checkpoint, and set again when the next epoch begins. That
makes the ends of epochs the places from which a fit can go on; checkpoints made inside an epoch are passed over, as
Lightning would start that epoch's samples anew. Only a job that SLURM puts back into its queue goes on from there, as
Lightning has it.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lightning_drm.training.settings import changed_settings

REQUEUED = "hpc_ckpt_*.ckpt"  # Lightning's name for the checkpoint of a job that goes back into SLURM's queue

_KEY = "lightning_drm"
_META_FILE = "meta.pt"  # of a sharded checkpoint, which is a folder; written last


class ResumePoint(Callback):
    """Adds to every checkpoint the states of the random generators, and whether an epoch has just ended.

    Args:
        settings: The fit's settings, which are added, too: other runs may keep their checkpoints in the same folder.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._epoch_ended = False
        self._restored: list[Any] | None = None
        self._begins_epoch = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._epoch_ended = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not trainer.sanity_checking

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_ended = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [_collect_rng_states(), *(generator.get_state() for generator in _generators(trainer))]
        checkpoint[_KEY] = {
            "epoch_ended": self._epoch_ended,
            "random_states": states,
            "settings": self._settings,
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint[_KEY]
        self._restored = kept["random_states"] if kept["epoch_ended"] else None
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            if kept["epoch_ended"] and counts["processed"] == counts["ready"]:  # not saved after a validation
                counts["completed"] = counts["processed"]
                self._begins_epoch = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begins_epoch:
            return
        # Where max_steps rules, Lightning would first go through the finished epoch once more, without batches.
        self._begins_epoch = False
        loop = trainer.fit_loop
        loop._restarting = loop.epoch_loop.restarting = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        everywhere, *own = self._restored
        self._restored = None
        _set_rng_states(everywhere)
        for generator, state in zip(_generators(trainer), own, strict=True):
            generator.set_state(state)
        loop = trainer.fit_loop
        # The iterator that Lightning would go on with was made before the states were set.
        if loop.is_resuming or loop.epoch_loop.restarting:
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)


def last_checkpoint(folders: Iterable[Path], settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint of most steps from which a fit can go on.

    Args:
        folders: Where a task's checkpoints are.
        settings: The fit's settings. Checkpoints of other ones are another run's.

    Returns:
        The checkpoint; ``None`` if there is none, or none is whole. Of several, the one that was written last, as it
        knows what the others' callbacks called the best.
    """
    steps = {path: _usable_step(path, settings) for folder in folders for path in sorted(folder.glob("*.ckpt"))}
    usable = {path: (step, path.stat().st_mtime_ns) for path, step in steps.items() if step}
    return max(usable, key=usable.__getitem__, default=None)


def is_of_fit(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is certainly of a fit with these settings.

    Args:
        path: The checkpoint.
        settings: The settings.
    """
    kept = _content(path).get(_KEY, {}).get("settings")
    return kept is not None and not changed_settings(kept, settings)


def _usable_step(path: Path, settings: Mapping[str, Any]) -> int | None:
    """How many steps a checkpoint has, if a fit can go on from it; older versions kept no settings in it."""
    content = _content(path)
    if (kept := content.get(_KEY)) is None or changed_settings(kept.get("settings", settings), settings):
        return None
    return int(content["global_step"]) if kept["epoch_ended"] or path.match(REQUEUED) else None


def _content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, with tensors that stay on disk; nothing if it is cut short, or another program's."""
    file = path / _META_FILE if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, BadZipFile):
        return {}
    return content if isinstance(content, dict) else {}


def _generators(trainer: Trainer) -> Iterator[torch.Generator]:
    """The generators of the training data's own loaders and samplers, each once."""
    seen: set[int] = set()
    for loader in CombinedLoader(trainer.train_dataloader).flattened if trainer.train_dataloader is not None else ():
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator
