"""Collecting one task in one Lightning fit: when the base is noted, and when its deltas are taken.

| hook | one device, ddp | FSDP1 | FSDP2 |
|---|---|---|---|
| `setup` | note the base | keep the module, note the base | keep the module |
| `on_fit_start` | | refuse what FSDP1 leaves to each process alone | note the base, now that it is sharded |
| `on_train_end` | collect | collect, while every rank has all weights | collect |

The base is not noted later than that, as a resumed fit has trained weights from then on. It is noted in the precision
in which it trains: what `precision="bf16-true"` rounds is the base's, not a delta. Deltas are not taken later than
`on_train_end`: Lightning tears its strategy down before `on_fit_end`. Only where a fit went on from a checkpoint of its
end, and so had nothing left to train, `on_fit_end` is the one hook of the two that comes. The module itself is left as
it was, since checkpoints are written after it; `chosen_weights` says how that goes with other weights than the last.
"""

from collections.abc import Mapping, Set

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_drm.deltas import backbone_parameters
from lightning_drm.deltas.wrappers import refuse_apart, refuse_flat
from lightning_drm.modules import data_parallel, head_names_of, unmeasurable
from lightning_drm.training.chosen_weights import (
    Weights,
    callbacks_of,
    chosen_weights,
    come_before_averaging,
    ends_with,
    frozen_tensors,
    refuse_averaged_codes,
    refuse_fit,
)
from lightning_drm.training.collect_statistics import collect_statistics
from lightning_drm.training.session import MergeSession
from lightning_drm.training.statistics import StatisticsPlan
from lightning_drm.training.strategies import (
    convert_precision,
    is_sharded_strategy,
    refuse_quantized,
    refuse_rounded_buffers,
    refuse_strategy,
    whole_weights,
)


def join_processes(session: MergeSession, trainer: Trainer) -> None:
    """Lets the processes of a Trainer collect and merge together.

    Raises:
        ValueError: If no deltas can be collected under its strategy.
    """
    refuse_strategy(trainer.strategy)
    session.join(trainer.world_size)


class CollectTask(Callback):
    """Hands one task's base and deltas to a session, at the right moments of a fit.

    Args:
        session: Where they go.
        task: The task that the fit belongs to.
        settings: Hyper-parameters of the finetune, to be stored with its deltas.
        weights: Which of its weights the deltas are taken from.
        statistics: What is collected of its training data, with the same weights, where they are whole.
    """

    def __init__(
        self,
        session: MergeSession,
        task: str,
        settings: Mapping[str, object] | None = None,
        weights: Weights = "last",
        statistics: StatisticsPlan | None = None,
    ) -> None:
        self.session = session
        self.task = task
        self.settings = settings
        self.weights = weights
        self.statistics = statistics or StatisticsPlan()
        self._collected = False
        self._frozen: Set[str] = frozenset()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.global_step > 0:
            raise ValueError(
                f"This Trainer has already fitted {trainer.global_step} steps, and would train task {self.task!r} from "
                "there or not at all: make a new Trainer for each task's fit."
            )
        if problem := unmeasurable(pl_module):
            raise ValueError(problem)
        strategy = trainer.strategy
        join_processes(self.session, trainer)
        refuse_fit(self.weights, trainer, self.task)
        refuse_averaged_codes(trainer, pl_module)
        refuse_flat(pl_module)
        convert_precision(strategy, pl_module)
        if isinstance(strategy, ModelParallelStrategy):
            data_parallel(strategy.device_mesh)  # refuses tensor parallelism
        if is_sharded_strategy(strategy):
            refuse_quantized(strategy, pl_module)
            if not any(True for _ in pl_module.parameters()):
                raise ValueError(
                    f"{type(pl_module).__name__} has no weights yet: under {type(strategy).__name__}, load them before "
                    "the fit, and let configure_model shard them."
                )
            self.session.keep_module(pl_module, self.task)
        if isinstance(strategy, FSDPStrategy):
            head = head_names_of(pl_module, self.session.head)
            refuse_rounded_buffers(strategy, backbone_parameters(pl_module, head))
        if not isinstance(strategy, ModelParallelStrategy):
            self._note_base(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note_start(trainer, pl_module, self)

    def note_start(self, trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
        """What `on_fit_start` does.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            callback: The one of the Trainer's callbacks that collects the task.
        """
        come_before_averaging(callback, trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._note_base(pl_module)
        elif isinstance(trainer.strategy, FSDPStrategy):
            refuse_apart(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with whole_weights(trainer.strategy):
            self.collect(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._collected:
            return
        if trainer.global_step > 0 and is_sharded_strategy(trainer.strategy):
            raise ValueError(
                f"Task {self.task!r} went on from a checkpoint of its last step, from which no deltas can be taken "
                f"under {type(trainer.strategy).__name__}: train it from the start, with --resume false."
            )
        if self.weights == "last" and not ends_with(self.weights, callbacks_of(trainer)):
            raise ValueError(
                f"Task {self.task!r} went on from a checkpoint of its last step, which may hold averaged weights in "
                "place of the last step's: train it from the start, with --resume false, or take weights 'averaged'."
            )
        self.collect(trainer, pl_module)

    def collect(self, trainer: Trainer, module: LightningModule) -> None:
        """Collects the task, where the strategy gives every rank the weights that it needs.

        Raises:
            ValueError: If nothing was trained, or the chosen weights are not there.
        """
        if trainer.global_step == 0:
            raise ValueError(
                f"Task {self.task!r} was not trained: its fit took no optimizer step. Does its training set have any "
                f"batches, and do the Trainer's limits leave some (max_steps, max_epochs, limit_train_batches)?"
            )
        self._collected = True
        with chosen_weights(self.weights, trainer, module, self.task, self._frozen, self.session.ranks):
            self.session.collect(module, self.task, settings=self.settings, num_steps=trainer.global_step)
            if not is_sharded_strategy(trainer.strategy):
                with isolate_rng():
                    self._collect_statistics(trainer, module)
        num_tasks = len(self.session.tasks)
        rank_zero_info(f"Collected task {self.task!r} ({num_tasks - len(self.session.missing)} of {num_tasks}).")

    def _collect_statistics(self, trainer: Trainer, module: LightningModule) -> None:
        needs, how = self.statistics.of(self.session.recipe.method)
        collect_statistics(
            self.session,
            module,
            self.task,
            lambda: trainer.train_dataloader,
            needs,
            how,
            strategy=trainer.strategy,
            data=getattr(trainer, "datamodule", None),
        )

    def _note_base(self, module: LightningModule) -> None:
        self.session.note_base(module, self.task)
        self._frozen = frozen_tensors(module)
