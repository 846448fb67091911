"""Which weights of a fit its deltas are taken from: the last step's, the best checkpoint's, or averaged ones.

| choice | where they are | what a fit must have |
|---|---|---|
| ``last`` | in the module, until an averaging callback puts the average there | |
| ``best`` | in the file that `ModelCheckpoint` calls best, which is settled before `on_train_end` | a monitor |
| ``averaged`` | with `WeightAveraging`, which hands them to every checkpoint | one such callback |

Chosen weights, buffers and head included, are put into the module while they are collected, and its own ones back
after that, bit by bit: checkpoint callbacks run later, and store what the module has. Frozen weights stay where they
are, as an average of equal numbers is equal to them only up to rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp._common_utils import clean_tensor_name

from lightning_drm.checkpoints.reading.tensors import PickleFiles
from lightning_drm.deltas import quantized_layers
from lightning_drm.deltas.sharded import local, shard_like
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.training.strategies import is_sharded_strategy

Weights = Literal["last", "best", "averaged"]


def require_choice(weights: str) -> None:
    """Refuses what is none of the choices.

    Raises:
        ValueError: If there is no such choice.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be last, best or averaged, got {weights!r}.")


def refuse_averaged_codes(trainer: Trainer, module: nn.Module) -> None:
    """Refuses callbacks that average all of a module's weights where some are quantized.

    Args:
        trainer: The Trainer of a fit.
        module: Its module.

    Raises:
        ValueError: If codes would be averaged, which would leave no weights at all.
    """
    averaging = [type(callback).__name__ for callback in _averaging(callbacks_of(trainer))]
    if averaging and (quantized := quantized_layers(module)):
        raise ValueError(
            f"{averaging[0]} would average the codes of quantized weights, such as {next(iter(quantized))}, which "
            "would be no weights any more: leave it out."
        )


def settings_of(weights: Weights, callbacks: Sequence[Callback]) -> dict[str, str]:
    """What is stored with the deltas, so that a run notices when other weights are asked for.

    Args:
        weights: The choice.
        callbacks: The callbacks of a fit.
    """
    settings = {"weights": str(weights)}
    if weights == "best":
        settings["weights.monitor"] = ", ".join(f"{c.monitor} ({c.mode})" for c in _monitoring(callbacks))
    if weights == "averaged":
        settings["weights.callback"] = ", ".join(type(averaging).__name__ for averaging in _averaging(callbacks))
    return settings


def refuse_fit(weights: Weights, trainer: Trainer, task: str) -> None:
    """Refuses a fit that cannot have the chosen weights, before it begins.

    Args:
        weights: The choice.
        trainer: The fit's Trainer, with all its callbacks.
        task: The task's name.

    Raises:
        ValueError: If a callback is missing or not the only one, or checkpoints cannot be read by then, naming it.
    """
    problem = {"last": _problem_of_last, "best": _problem_of_best, "averaged": _problem_of_averaged}[weights](trainer)
    if problem is not None:
        raise ValueError(f"Task {task!r} is to be merged with weights {weights!r}, but {problem}.")


def come_before_averaging(callback: Callback, trainer: Trainer) -> None:
    """Moves a callback in front of those that replace the last step's weights, and round frozen ones, in the end.

    Args:
        callback: The callback, which collects a task.
        trainer: Its Trainer. Lightning itself moves checkpoint callbacks to the end in the same way.
    """
    callbacks = callbacks_of(trainer)
    places = [place for place, other in enumerate(callbacks) if isinstance(other, WeightAveraging)]
    if places and places[0] < callbacks.index(callback):
        others = [other for other in callbacks if other is not callback]
        cast(Any, trainer).callbacks = [*others[: places[0]], callback, *others[places[0] :]]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a Trainer, which Lightning's own types leave out."""
    return list(cast(Any, trainer).callbacks)


def ends_with(weights: Weights, callbacks: Sequence[Callback]) -> bool:
    """Whether a module certainly has the chosen weights when its fit is over.

    Args:
        weights: The choice.
        callbacks: The callbacks of the fit.
    """
    return weights == "last" and not _averaging(callbacks)


def frozen_tensors(module: nn.Module) -> set[str]:
    """The parameters that will not be trained, by the names that they have in a checkpoint.

    Args:
        module: The module before its training.
    """
    return {
        name
        for name, tensor in _tensors_of(module).items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }


def chosen_weights(
    weights: Weights, trainer: Trainer, module: LightningModule, task: str, frozen: Set[str], ranks: Ranks
) -> AbstractContextManager[None]:
    """While it lasts, a trained module has the chosen weights; all ranks enter it together.

    Args:
        weights: The choice.
        trainer: The Trainer whose training has ended.
        module: The module; under FSDP1, while every rank has all weights.
        task: The task's name.
        frozen: What `frozen_tensors` said of the module.
        ranks: The processes that trained it together.

    Raises:
        ValueError: If nothing was saved or averaged, or the checkpoint is not of this module.
    """
    if weights == "best":
        return _with_checkpoint(trainer, module, task, frozen, ranks)
    if weights == "averaged":
        return _with_average(trainer, module, task, frozen)
    return nullcontext()


def _monitoring(callbacks: Sequence[Callback]) -> list[ModelCheckpoint]:
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.monitor]


def _averaging(callbacks: Sequence[Callback]) -> list[WeightAveraging]:
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def _has_swa(trainer: Trainer) -> bool:
    return any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer))


def _problem_of_last(trainer: Trainer) -> str | None:
    if _has_swa(trainer):
        return (
            "StochasticWeightAveraging may put averages into the module before training ends; take WeightAveraging "
            "with weights 'averaged', or leave it out"
        )
    return None


def _problem_of_best(trainer: Trainer) -> str | None:
    found = _monitoring(callbacks_of(trainer))
    if not found:
        return "its fit has no ModelCheckpoint with a monitor, by which a checkpoint would be the best one"
    if len(found) > 1:
        return (
            f"its fit has several ModelCheckpoint that monitor ({', '.join(str(c.monitor) for c in found)}): keep one"
        )
    if found[0].save_top_k == 0:
        return "its ModelCheckpoint has save_top_k=0, which saves no best checkpoint"
    if found[0].best_model_path and cast(Any, trainer).ckpt_path is None:
        return f"its ModelCheckpoint holds another fit's best, {found[0].best_model_path}: give each fit one of its own"
    if cast(Any, trainer).fast_dev_run:
        return "no checkpoint is saved in a fast_dev_run"
    strategy = trainer.strategy
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        return "AsyncCheckpointIO may still be writing the best checkpoint when training ends; leave it out"
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type != "full":
        return "FSDPStrategy saves its checkpoints in pieces; give it state_dict_type='full'"
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        return "ModelParallelStrategy saves its checkpoints in pieces; give it save_distributed_checkpoint=False"
    return None


def _problem_of_averaged(trainer: Trainer) -> str | None:
    found = _averaging(callbacks_of(trainer))
    if _has_swa(trainer):
        return "StochasticWeightAveraging does not keep its averages apart; take WeightAveraging in its place"
    if not found:
        return "its fit has no WeightAveraging or EMAWeightAveraging callback"
    if len(found) > 1:
        return f"its fit has several averaging callbacks ({', '.join(type(c).__name__ for c in found)}): keep one"
    if is_sharded_strategy(trainer.strategy):
        return f"{type(found[0]).__name__} cannot average weights that {type(trainer.strategy).__name__} shards"
    return None


def _with_average(
    trainer: Trainer, module: LightningModule, task: str, frozen: Set[str]
) -> AbstractContextManager[None]:
    (averaging,) = _averaging(callbacks_of(trainer))
    checkpoint: dict[str, Any] = {"state_dict": {}}
    averaging.on_save_checkpoint(trainer, module, checkpoint)  # its own way of handing the average on
    if not int(checkpoint["averaging_state"]["n_averaged"]):
        raise ValueError(
            f"Task {task!r} is to be merged with weights 'averaged', but {type(averaging).__name__} has averaged "
            "nothing: the training ended before its first update."
        )
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return _filled({n: t for n, t in _tensors_of(module).items() if n not in frozen}, state.__getitem__)


def _with_checkpoint(
    trainer: Trainer, module: LightningModule, task: str, frozen: Set[str], ranks: Ranks
) -> AbstractContextManager[None]:
    """Rank 0 reads, since the others may not see its files; nothing in the file is executed."""
    (saving,) = _monitoring(callbacks_of(trainer))
    live = {name: tensor for name, tensor in _tensors_of(module).items() if name not in frozen}
    problem, held = None, None
    if ranks.is_first:
        try:
            held = _opened(saving, live)
        except ValueError as error:
            problem = str(error)
    if (problem := ranks.gather(problem)[0]) is not None:
        raise ValueError(f"Task {task!r} is to be merged with weights 'best', but {problem}")

    def read(name: str) -> Tensor:
        if held is not None:
            tensor = held.read(name).to(live[name].dtype).contiguous()
        else:
            tensor = torch.empty(live[name].shape, dtype=live[name].dtype)
        return ranks.copy_from(tensor, 0)

    return _filled(live, read)


def _opened(saving: ModelCheckpoint, live: Mapping[str, Tensor]) -> PickleFiles:
    """The best checkpoint, which has at least these tensors; users may leave frozen ones out."""
    path = Path(saving.best_model_path)
    if not saving.best_model_path:
        raise ValueError(
            f"ModelCheckpoint has saved none by {saving.monitor!r}: was that logged, and did an epoch end?"
        )
    if not path.is_file():
        raise ValueError(f"{path}, which ModelCheckpoint calls the best, is no file that is there.")
    held = PickleFiles([path])
    shapes = {name: header.shape for name, header in held.headers.items()}
    if misfits := [name for name, tensor in live.items() if shapes.get(name) != tuple(tensor.shape)]:
        raise ValueError(f"{path} is not of this module: {', '.join(misfits[:3])} missing or of another shape.")
    return held


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors that a checkpoint holds, by the names that they have there."""
    found: dict[str, Tensor] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        transient = child._non_persistent_buffers_set
        own = {**child._parameters, **{n: b for n, b in child._buffers.items() if n not in transient}}
        for name, tensor in own.items():
            if tensor is not None:
                found[clean_tensor_name(f"{prefix}.{name}" if prefix else name)] = tensor
    return found


@contextmanager
@torch.no_grad()
def _filled(live: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Iterator[None]:
    """While it lasts, a module's tensors hold other values."""
    own: dict[str, Tensor] = {}
    try:
        for name, tensor in live.items():
            own[name] = local(tensor.detach()).to("cpu", copy=True)
            value = read(name).detach().to(tensor.device, tensor.dtype)
            local(tensor.detach()).copy_(local(shard_like(value, tensor)))
        yield
    finally:
        for name, kept in reversed(own.items()):  # a tied tensor has two names, and its own values under the first
            local(live[name].detach()).copy_(kept)
