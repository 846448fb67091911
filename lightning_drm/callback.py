"""The callback that turns a series of single-task fits into one merged model.

It only listens: before a fit it notes the base, at the end of training, while the weights are still on their device, it
takes the task's deltas and head. When the last task has arrived it fuses. It never changes the module that it watches,
since checkpoints are written after it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from lightning_drm.deltas import Base, TaskVector, fingerprint
from lightning_drm.engine import Fusion, Override, Recipe, RunFolder, model_card, write_merged
from lightning_drm.merging import DRM, LowRank, Method
from lightning_drm.modules import MultiTaskModule, head_names_of
from lightning_drm.names import check_task_name

Store = Literal["auto", "device", "cpu", "disk"]


class DRMMergeCallback(Callback):
    """Collects each task's weight deltas when its fit ends, and fuses them when the last one has come.

    One callback object serves one fit per task, each with a fresh Trainer. A fit belongs to the task that the module's
    ``task_name`` names; a module without that attribute belongs to the first of ``tasks`` that has not arrived yet.

    Args:
        tasks: The tasks' names, in the order of their fits and of the test dataloaders.
        method: How deltas are merged.
        dirpath: Run folder, where deltas, heads and the merged model are written. Nothing is written without it.
        coefficients: Coefficient by task; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` merges convolution weights as ``(out, in·k·k)`` matrices, ``"average"`` does not.
        vectors: What a matrix method does to the rest: the weighted ``"average"`` of all tasks, or of those that
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
        vectors: Literal["average", "elect"] = "average",
        overrides: Sequence[Override] = (),
        store: Store = "auto",
        head: Sequence[str] | None = None,
    ) -> None:
        self.tasks = list(tasks)
        for task in self.tasks:
            check_task_name(task)
        self.recipe = Recipe(method, dict(coefficients or {}), convolutions, vectors, tuple(overrides))
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
        self._fitting: str | None = None
        self._merged: MultiTaskModule | None = None

    @property
    def missing(self) -> list[str]:
        """The tasks that have not arrived yet."""
        return [task for task in self.tasks if task not in self._vectors]

    @property
    def task_vectors(self) -> dict[str, TaskVector]:
        """The task vectors that have arrived, in the order of ``tasks``."""
        return {task: self._vectors[task] for task in self.tasks if task in self._vectors}

    @property
    def is_merged(self) -> bool:
        """Whether the merged model is there."""
        return self._merged is not None

    @property
    def method_description(self) -> dict[str, object]:
        """The recipe as configuration: the method's class path and arguments, and what else decides the merge."""
        method = self.recipe.method
        return {
            "class_path": f"lightning_drm.{type(method).__name__}",
            "init_args": method.hyperparameters(),
            "coefficients": dict(zip(self.tasks, self.recipe.coefficients_of(self.tasks), strict=True)),
            "convolutions": self.recipe.convolutions,
        }

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
        self._fitting = self._task_of(pl_module)
        self._base.remember(pl_module, head_names_of(pl_module, self.head), self._fitting)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._fitting is not None, "setup names the task before training starts"
        vector = self._base.task_vector(
            pl_module, head_names_of(pl_module, self.head), self._fitting, _settings_of(pl_module)
        )
        self._keep(vector, trainer)
        rank_zero_info(f"Collected task {vector.task!r} ({len(self._vectors)} of {len(self.tasks)}).")
        self._fitting = None
        if not self.missing:
            self.fuse(pl_module, device=pl_module.device, write=trainer.is_global_zero)
            trainer.strategy.barrier("lightning_drm: merged model written")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fitting = None

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

    def fuse(
        self, module: LightningModule, *, device: torch.device | None = None, write: bool = True
    ) -> MultiTaskModule:
        """Merges all task vectors; called by itself when the last task has arrived.

        Args:
            module: Any task's module, trained or not; it stays as it is.
            device: Where to compute; the module's if left out.
            write: Whether this process writes the merged model into the run folder.

        Returns:
            The merged model, also available as `merged_module`.

        Raises:
            RuntimeError: If tasks are missing.
        """
        if self.missing:
            raise RuntimeError(f"Cannot merge: tasks {', '.join(self.missing)} have not arrived.")
        head = head_names_of(module, self.head)
        device = device or module.device
        fusion = Fusion(self.recipe, list(self.task_vectors.values()), device)
        # Copied: the module may train on, and must not change the merged model by it.
        backbone = {name: tensor.to(device, copy=True) for name, tensor in self._base.tensors(module, head).items()}
        name = type(self.recipe.method).__name__
        deltas = track(fusion, f"merging with {name}", total=len(fusion), disable=not write)
        for parameter, delta in deltas:
            base = backbone[parameter]
            backbone[parameter] = (base.to(delta.dtype) + delta).to(base.dtype)
        heads = {
            task: {key: tensor.to(device) for key, tensor in vector.head.items()}
            for task, vector in self.task_vectors.items()
        }
        self._merged = MultiTaskModule.assemble(module, head, backbone, heads)
        if write and self.run_folder is not None:
            any_task = self._merged.task_module(self.tasks[0])
            card = model_card(
                self.recipe,
                {task: {"parameters with a delta": len(vector.deltas)} for task, vector in self.task_vectors.items()},
                base=getattr(module, "backbone_name", None),
                base_fingerprint=fingerprint(self._base.hashes),
            )
            write_merged(self.run_folder.merged, any_task, head, heads, card)
        return self._merged

    def finetuned_module(self, module: LightningModule, task: str) -> MultiTaskModule:
        """Rebuilds one task's finetuned model from its task vector.

        Args:
            module: Any task's untrained module; it stays as it is.
            task: The task's name.

        Returns:
            A module with that task alone.
        """
        vector = self._vectors[task]
        head = head_names_of(module, self.head)
        backbone = self._base.tensors(module, head)
        for name, delta in vector.deltas.items():
            dense = delta.dense() if isinstance(delta, LowRank) else delta
            base = backbone[name]
            backbone[name] = (base.to(dense.dtype) + dense.to(base.device)).to(base.dtype)
        heads = {task: {key: tensor.to(module.device) for key, tensor in vector.head.items()}}
        return MultiTaskModule.assemble(module, head, backbone, heads)

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

    def _keep(self, vector: TaskVector, trainer: Trainer) -> None:
        store = self.store
        if self.run_folder is not None:
            if trainer.is_global_zero:
                self.run_folder.save_task_vector(vector)
            trainer.strategy.barrier("lightning_drm: deltas written")
            if store in ("auto", "disk"):
                self._vectors[vector.task] = self.run_folder.load_task_vector(vector.task)
                return
        if store == "cpu" or (store == "auto" and not _fits_on_device(vector)):
            vector = _to_cpu(vector)
        self._vectors[vector.task] = vector


def refuse_strategy(strategy: Strategy) -> None:
    """Refuses, by name, strategies under which no process holds the whole weights or the callback's state is lost.

    Args:
        strategy: The Trainer's strategy.

    Raises:
        ValueError: If the strategy is not supported.
    """
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        method = strategy.launcher._start_method
        raise ValueError(
            f"{name} starts its processes by {method}, which loses the callback's deltas when they end; "
            "use strategy 'ddp', which starts scripts."
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"{name} is not supported by DRMMergeCallback; use a single device or 'ddp'.")


def _settings_of(module: LightningModule) -> Mapping[str, object]:
    settings = getattr(module, "finetune_settings", None)
    return settings if settings is not None else {}


def _fits_on_device(vector: TaskVector) -> bool:
    """Whether the device keeps room for training after holding the deltas: as much again as they take."""
    tensors = _tensors(vector)
    if not tensors or tensors[0].device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(tensors[0].device)
    return free > sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(vector: TaskVector) -> list[Tensor]:
    deltas = vector.deltas.values()
    return [t for delta in deltas for t in ((delta.up, delta.down) if isinstance(delta, LowRank) else (delta,))]


def _to_cpu(vector: TaskVector) -> TaskVector:
    deltas = {
        name: LowRank(delta.up.cpu(), delta.down.cpu()) if isinstance(delta, LowRank) else delta.cpu()
        for name, delta in vector.deltas.items()
    }
    return TaskVector(
        vector.task,
        deltas,
        vector.kinds,
        {name: tensor.cpu() for name, tensor in vector.head.items()},
        vector.base_hashes,
        vector.settings,
    )
