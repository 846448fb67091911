"""The callback that turns a series of single-task fits into one merged model.

It only listens: before a fit it notes the base, at the end of training, while the weights are still on their device, it
takes the task's deltas and head. When the last task has arrived it fuses. It never changes the module that it watches,
since checkpoints are written after it.

Where several processes train together they also merge together: each keeps and merges its share of the parameters.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import Progress
from torch import Tensor
from typing_extensions import override

from lightning_drm.deltas import Base, TaskVector, backbone_parameters, fingerprint
from lightning_drm.deltas.sharded import shard_like
from lightning_drm.deltas.wrappers import is_flat, refuse_apart, refuse_flat
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.distributed.watch import watched
from lightning_drm.fusion import Fusion, Override, Recipe, model_card
from lightning_drm.merging import DRM, LowRank, Method
from lightning_drm.modules import (
    MultiTaskModule,
    data_parallel,
    head_names_of,
    is_sharded,
    with_buffers_of,
    without_weights,
)
from lightning_drm.names import check_task_name
from lightning_drm.training.delta_cache import Store, WaitingRoom
from lightning_drm.training.exchange import Owners, merge_together
from lightning_drm.training.merged_folder import write_merged
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.strategies import refuse_rounded_buffers, refuse_strategy, whole_weights


class DRMMergeCallback(Callback):
    """Collects each task's weight deltas when its fit ends, and fuses them when the last one has come.

    One callback object serves one fit per task, each with a fresh Trainer. A fit belongs to the task that the module's
    ``task_name`` names; a module without that attribute belongs to the first of ``tasks`` that has not arrived yet.

    Fits may run on one device, under ``ddp``, or sharded under ``FSDPStrategy`` (FSDP1) or ``ModelParallelStrategy``
    (FSDP2). Under FSDP1 each rank has all weights for as long as a task is collected and merged, and the merged model
    is not sharded. Parameters are shared out over the ranks by what they cost to merge; deltas that wait on a device or
    in host memory wait with their owner.

    Args:
        tasks: The tasks' names, in the order of their fits and of the test dataloaders.
        method: How deltas are merged.
        dirpath: Run folder, where deltas, heads and the merged model are written. Nothing is written without it.
        coefficients: Coefficient by task; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` merges convolution weights as ``(out, in·k·k)`` matrices, ``"average"`` does not.
        non_matrix: What a matrix method does to the rest: the weighted ``"average"`` of all tasks, or of those that
            ``"elect"`` the same sign.
        overrides: Exceptions by name; the first that matches a parameter counts.
        store: Where deltas wait for the other tasks: on the ``device``, in host memory (``cpu``), or on ``disk``.
            ``auto`` takes the disk if there is a run folder, else the device while it has room, else host memory.
        head: Names of the submodules or parameters that are a task's head; the module's own ``head_names`` if left out.

    Raises:
        ValueError: If names repeat or cannot be folder names, coefficients are given for unknown tasks, or
            ``store="disk"`` has no ``dirpath``.

    Example:
        >>> merge = DRMMergeCallback(["topic", "valence"], method=DRM(density=0.2))
        >>> merge.missing
        ['topic', 'valence']
    """

    def __init__(
        self,
        tasks: Sequence[str],
        method: Method = DRM(),
        dirpath: str | os.PathLike[str] | None = None,
        *,
        coefficients: Mapping[str, float] | None = None,
        convolutions: Literal["average", "matrix"] = "average",
        non_matrix: Literal["average", "elect"] = "average",
        overrides: Sequence[Override] = (),
        store: Store = "auto",
        head: Sequence[str] | None = None,
    ) -> None:
        self.tasks = list(tasks)
        for task in self.tasks:
            check_task_name(task)
        self.recipe = Recipe(method, dict(coefficients or {}), convolutions, non_matrix, tuple(overrides))
        self.run_folder = RunFolder(dirpath) if dirpath is not None else None
        self.store = store
        self.head = head
        problems = []
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks must be different names, at least one, got {self.tasks}")
        if store not in ("auto", "device", "cpu", "disk"):
            problems.append(f"store must be auto, device, cpu or disk, got {store!r}")
        if store == "disk" and dirpath is None:
            problems.append("store='disk' needs a dirpath to write to")
        if problems:
            raise ValueError(f"DRMMergeCallback: {'; '.join(problems)}.")
        self.recipe.check(self.tasks)
        self._base = Base()
        self._vectors: dict[str, TaskVector] = {}
        self._ranks = ALONE
        self._owners = Owners(self.recipe, self.tasks)
        self._fitting: str | None = None
        self._template: LightningModule | None = None  # what is fitted, as it was before it was sharded
        self._merged: MultiTaskModule | None = None

    @property
    def missing(self) -> list[str]:
        """The tasks that have not arrived yet."""
        return [task for task in self.tasks if task not in self._vectors]

    @property
    def task_vectors(self) -> dict[str, TaskVector]:
        """The task vectors that have arrived, in the order of ``tasks``.

        Under several ranks, deltas that another rank keeps are meta tensors here.
        """
        return {task: self._vectors[task] for task in self.tasks if task in self._vectors}

    @property
    def is_merged(self) -> bool:
        """Whether the merged model is there."""
        return self._merged is not None

    @property
    def merged_module(self) -> MultiTaskModule:
        """The merged model with every task's head, for ``trainer.test(merge.merged_module, …)``.

        Raises:
            RuntimeError: If tasks are still missing.
        """
        if self._merged is None:
            raise RuntimeError(
                f"Nothing is merged yet: tasks {', '.join(self.missing) or 'were not fused'} are missing."
            )
        return self._merged

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_strategy(trainer.strategy)
        self.join(trainer.world_size)
        refuse_flat(pl_module)
        self._fitting = self._task_of(pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            data_parallel(trainer.strategy.device_mesh)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            if not any(True for _ in pl_module.parameters()):
                strategy = type(trainer.strategy).__name__
                raise ValueError(
                    f"{type(pl_module).__name__} has no weights yet: under {strategy}, load them before the fit, and "
                    "let configure_model shard them."
                )
            self._template = without_weights(pl_module)
        if isinstance(trainer.strategy, FSDPStrategy):
            parameters = backbone_parameters(pl_module, head_names_of(pl_module, self.head))
            refuse_rounded_buffers(trainer.strategy, parameters)
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            self._remember(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now are the weights sharded; and such a strategy reads the weights of a resumed fit after this hook.
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._remember(pl_module)
        elif isinstance(trainer.strategy, FSDPStrategy):
            refuse_apart(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._fitting is not None, "setup names the task before training starts"
        with whole_weights(trainer.strategy):
            vector = self._collect(pl_module, self._fitting)
            self._vectors[vector.task] = vector
            rank_zero_info(f"Collected task {vector.task!r} ({len(self._vectors)} of {len(self.tasks)}).")
            self._fitting = None
            if not self.missing:
                self._fuse(pl_module, pl_module.device)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fitting = None

    def join(self, world_size: int) -> Ranks:
        """Lets all ranks of the default process group collect and merge together from now on; called by every fit.

        Args:
            world_size: How many processes take part in it; 1 leaves this one alone.

        Returns:
            The ranks.
        """
        if self._ranks.size != world_size:
            self._ranks = Ranks.of_process_group() if world_size > 1 else ALONE
            self._owners = Owners(self.recipe, self.tasks)
        return self._ranks

    def restore(self, tasks: Sequence[str] | None = None) -> None:
        """Takes up task vectors that the run folder already has.

        Args:
            tasks: Which ones; all that are missing if left out.

        Raises:
            FileNotFoundError: If one was never finetuned.
            ValueError: If there is no run folder, or a base differs.
        """
        if self.run_folder is None:
            raise ValueError("DRMMergeCallback has no dirpath, so there is nothing to restore from.")
        for task in tasks if tasks is not None else self.missing:
            vector = self.run_folder.load_task_vector(task)
            self._base.require(vector.base_hashes, task)
            self._vectors[task] = vector

    def fuse(self, module: LightningModule, *, device: torch.device | None = None) -> MultiTaskModule:
        """Merges all task vectors, and writes the merged model if there is a run folder; all ranks call it together.

        It is called by itself when the last task has arrived.

        Args:
            module: Any task's module, trained or not; it stays as it is.
            device: Where to compute; the module's if left out.

        Returns:
            The merged model, on the module's device or sharded as the module is, also available as `merged_module`.

        Raises:
            RuntimeError: If tasks are missing.
            ValueError: If what is to be merged does not fit together; or if another rank was killed, naming it; or if
                the module was fitted under FSDP1.
        """
        if self.missing:
            raise RuntimeError(f"Cannot merge: tasks {', '.join(self.missing)} have not arrived.")
        refuse_flat(module)
        return self._fuse(module, device or module.device)

    def finetuned_module(self, module: LightningModule, task: str) -> MultiTaskModule:
        """Rebuilds one task's finetuned model from its task vector. All ranks call it together.

        Args:
            module: Any task's untrained module, not sharded; it stays as it is.
            task: The task's name.

        Returns:
            A module with that task alone.

        Raises:
            ValueError: If the module was fitted under FSDP1.
        """
        refuse_flat(module)
        vector = self._vectors[task]
        head = head_names_of(module, self.head)
        backbone = self._base.tensors(module, head)
        for name in vector.deltas:
            base, delta = backbone[name], self._waiting_room.everywhere(vector, name)
            dense = delta.dense() if isinstance(delta, LowRank) else delta
            backbone[name] = (base.to(dense.dtype) + dense.to(base.device)).to(base.dtype)
        heads = {task: {key: tensor.to(module.device) for key, tensor in vector.head.items()}}
        return MultiTaskModule.assemble(module, head, backbone, heads)

    def _fuse(self, module: LightningModule, device: torch.device) -> MultiTaskModule:
        head = head_names_of(module, self.head)
        heads = {task: dict(vector.head) for task, vector in self.task_vectors.items()}
        writes = self.run_folder is not None and self._ranks.is_first
        with watched(self._ranks, _advice(self.run_folder)):
            backbone, written = self._merged_backbone(module, head, device, writes)
        template = module
        if is_sharded(module) or is_flat(module):
            assert self._template is not None, "a module that is sharded went through setup"
            template = with_buffers_of(module, self._template)
        here = {
            task: {name: tensor.to(module.device) for name, tensor in state.items()} for task, state in heads.items()
        }
        self._merged = MultiTaskModule.assemble(template, head, backbone, here)
        if writes:
            of_one = {self.tasks[0]: heads[self.tasks[0]]}
            self._write(MultiTaskModule.assemble(template, head, written, of_one), head, heads)
        self._ranks.wait()
        return self._merged

    def _merged_backbone(
        self, module: LightningModule, head: Sequence[str], device: torch.device, writes: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The merged backbone as the module holds its own; and, for the rank that writes, all of it in host memory."""
        base = self._base.tensors(module, head)
        self._share_out(module, head)
        fusion = Fusion(
            self.recipe,
            list(self.task_vectors.values()),
            device,
            shapes={name: tuple(tensor.shape) for name, tensor in base.items()},
            share={name for name, owner in self._owners.items() if owner == self._ranks.rank},
            reduce=self._ranks.sum,
        )
        backbone: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        with Progress(disable=not self._ranks.is_first) as bar:
            row = bar.add_task(f"merging with {type(self.recipe.method).__name__}", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(row, completed=done, total=total)

            for name, weight in merge_together(fusion, base, self._owners, self._ranks, progress):
                # Copied where it is the base's: the module may train on, and must not change the merged model by it.
                own = weight.to(module.device, copy=name not in fusion.kinds)
                backbone[name] = shard_like(own, base[name])
                if writes:
                    written[name] = own.cpu()
        return backbone, written

    def _write(self, merged: MultiTaskModule, head: tuple[str, ...], heads: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert self.run_folder is not None
        any_task = merged.task_module(merged.task_names[0])
        card = model_card(
            self.recipe,
            {task: {"parameters with a delta": len(vector.deltas)} for task, vector in self.task_vectors.items()},
            base=getattr(any_task, "backbone_name", None),
            base_fingerprint=fingerprint(self._base.hashes),
        )
        write_merged(self.run_folder.merged, any_task, head, heads, card)

    def _task_of(self, module: LightningModule) -> str:
        name = getattr(module, "task_name", None)
        if name is None:
            if not self.missing:
                raise ValueError(f"All tasks ({', '.join(self.tasks)}) have arrived; give further fits a new callback.")
            return self.missing[0]
        if name not in self.tasks:
            raise ValueError(
                f"The module's task_name is {name!r}, which is not one of the tasks {', '.join(self.tasks)}."
            )
        return str(name)

    def _remember(self, module: LightningModule) -> None:
        """Notes the base, and refuses before training what could not be merged after it."""
        assert self._fitting is not None
        head = head_names_of(module, self.head)
        self._base.remember(module, head, self._fitting, self._ranks)
        trained = self._base.trained(module, head)
        shapes = {name: tuple(parameter.tensor.shape) for name, parameter in trained.items()}
        if problems := self.recipe.misfits({name: parameter.kind for name, parameter in trained.items()}, shapes):
            raise ValueError("\n".join(problems))
        self._owners.share_out(trained, self._ranks.size)

    def _collect(self, module: LightningModule, task: str) -> TaskVector:
        """Takes a task's deltas, stores them if there is a run folder, and returns what this rank keeps of them."""
        room = self._waiting_room
        head = head_names_of(module, self.head)
        settings = _settings_of(module)
        return room.take_in(self._base.task_vector(module, head, task, settings, ranks=self._ranks, keep=room.place))

    @property
    def _waiting_room(self) -> WaitingRoom:
        return WaitingRoom(self.store, self.run_folder, self._owners, self._ranks)

    def _share_out(self, module: LightningModule, head: Sequence[str]) -> None:
        """Finds owners for what only stored task vectors train."""
        parameters = backbone_parameters(module, head)
        names = [name for vector in self.task_vectors.values() for name in vector.deltas]
        self._owners.share_out({name: parameters[name] for name in names}, self._ranks.size)


def _settings_of(module: LightningModule) -> Mapping[str, object]:
    settings = getattr(module, "finetune_settings", None)
    return settings if settings is not None else {}


def _advice(run_folder: RunFolder | None) -> str:
    """What to do when a rank was killed while all of them merged."""
    if run_folder is None:
        return "Nothing was stored, since there is no dirpath: the fits have to be done again."
    return f"The deltas of all tasks are in {run_folder.path}: fit or merge again, and no task is trained twice."
