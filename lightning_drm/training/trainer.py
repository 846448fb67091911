"""Lightning's Trainer for several tasks: finetune each, merge, test, report.

The orchestration only: a fresh Trainer and a fresh module per task (a Trainer fits once), the same seed before each,
and a run folder that remembers what is done. Deltas and fusing are the callback's, accuracies the evaluation's.

Under a strategy of several processes, all of them go through all of it together, from before the first fit to the
report. What the run folder says is read by one rank, for the others may see it late; and that rank writes.
"""

import copy
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from signal import SIGTERM
from typing import Any, TypeVar, cast

from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from safetensors.torch import load_file
from typing_extensions import override

from lightning_drm.data import MultiTaskDataModule
from lightning_drm.deltas import head_state
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.evaluation import Comparison, linear_probe, logged_metrics, measure, terminal_table, write_report
from lightning_drm.modules import MultiTaskModule, data_parallel, duplicate, head_names_of
from lightning_drm.storage import write_tensors
from lightning_drm.training.callback import DRMMergeCallback
from lightning_drm.training.merged_folder import read_merged
from lightning_drm.training.progress import TaskProgressBar
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.settings import changed_settings, finetune_settings
from lightning_drm.training.strategies import refuse_strategy

Accuracies = dict[str, float | None]
T = TypeVar("T")


class MergeTrainer(Trainer):
    """Finetunes every task of a `MultiTaskDataModule`, merges, and tests base, individual and merged models.

    It takes the arguments of Lightning's Trainer, which hold for each task's fit, and needs one `DRMMergeCallback` with
    a ``dirpath`` among its callbacks. With a single task's data, ``fit`` and ``test`` are those of Lightning's Trainer.

    Under ``FSDPStrategy`` (FSDP1) tasks are trained sharded, and tested whole on every process, as under ``ddp``.

    Args:
        kwargs: Arguments of ``lightning.Trainer``.
    """

    def __init__(self, **kwargs: Any) -> None:
        given = kwargs.get("callbacks") or []
        self._given_callbacks = list(given) if isinstance(given, Sequence) else [given]
        # Lightning adds to the list of callbacks that it got, and a strategy serves one Trainer.
        self._arguments = {**kwargs, "callbacks": self._given_callbacks}
        self._arguments["strategy"] = copy.deepcopy(kwargs.get("strategy", "auto"))
        self._ranks: Ranks = ALONE
        super().__init__(**kwargs)
        self._console = Console(quiet=not is_writer(), highlight=False)

    @override
    def fit(  # type: ignore[override]  # some of Lightning's arguments come as keywords, and three are this class's own
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        *,
        only: str | list[str] | None = None,
        retrain: bool = False,
        base_batches: int = 40,
        **kwargs: Any,
    ) -> None:
        """Finetunes each task from the same base, then merges and tests. Tasks already done are not trained again.

        Args:
            model: Template of a task's module. Each task trains a copy of it, whose ``configure_task(num_classes)``, if
                it has one, is called with the number of classes of the task's data.
            train_dataloaders: As in Lightning, for a single task.
            val_dataloaders: As in Lightning, for a single task.
            datamodule: The tasks.
            only: Finetune this task, or these, and stop without merging (one job of a cluster's array, say).
            retrain: Finetune tasks again that the run folder already has.
            base_batches: Training batches that the head on the untouched base may see; 0 leaves the base out.
            kwargs: Further arguments of Lightning's ``fit``, for a single task.

        Raises:
            ValueError: If the tasks, the callback and the run folder do not fit together.
        """
        if not isinstance(datamodule, MultiTaskDataModule):
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, **kwargs)
            return
        merge, folder = self._merge_callback(datamodule)
        tasks = _chosen(merge.tasks, only)
        settings = {task: self._settings(model, datamodule, task) for task in tasks}

        def finetune_and_merge(done: list[str]) -> None:
            if only is None:
                merge.restore(done)
            for task in tasks:
                if task in done:
                    accuracy = folder.read_metrics(task)["individual"]
                    self._say(f"{task}: finetuned before (accuracy {100 * accuracy:.1f} %), not trained again")
                else:
                    self._finetune(model, datamodule.tasks[task], task, merge, settings[task], base_batches)
            if only is None:
                self._merge_and_report(merge, folder, model, datamodule)

        with _locked(folder, tasks):
            found = [] if retrain else _still_valid(folder, settings)
            self._on_all_ranks(merge, lambda: finetune_and_merge(self.strategy.broadcast(found)))
        if only is None:
            return
        if missing := folder.missing(merge.tasks):
            self._say(f"In {folder.path}, {', '.join(missing)} still to be finetuned.")
        else:
            self._say(f"All tasks in {folder.path} are finetuned; `merge` comes next.")

    def merge(self, model: LightningModule, datamodule: MultiTaskDataModule) -> None:
        """Merges the finetuned tasks again, with any method, and tests. Trains nothing.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.

        Raises:
            ValueError: If tasks are not finetuned yet.
        """
        merge, folder = self._merge_callback(datamodule)
        _require_done(folder, merge.tasks)

        def restore_and_merge() -> None:
            merge.restore()
            self._merge_and_report(merge, folder, model, datamodule)

        with _locked(folder, merge.tasks):
            self._on_all_ranks(merge, restore_and_merge)

    @override
    def test(  # type: ignore[override]  # some of Lightning's arguments come as keywords
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        **kwargs: Any,
    ) -> list[Mapping[str, float]]:
        """Measures base, individual and merged models again, from what the run folder has.

        Args:
            model: Template of a task's module, as for ``fit``.
            dataloaders: As in Lightning, for a single module.
            datamodule: The tasks.
            kwargs: Further arguments of Lightning's ``test``, for a single module.

        Returns:
            What Lightning's ``test`` returns; for several tasks, one dictionary of the logged metrics.

        Raises:
            ValueError: If tasks are not finetuned yet.
            FileNotFoundError: If they are not merged yet.
        """
        if model is None or isinstance(model, MultiTaskModule) or not isinstance(datamodule, MultiTaskDataModule):
            return super().test(model, dataloaders, datamodule=datamodule, **kwargs)
        merge, folder = self._merge_callback(datamodule)
        _require_done(folder, merge.tasks)
        with _locked(folder, merge.tasks):
            return self._on_all_ranks(merge, lambda: [self._measure_again(merge, folder, model, datamodule)])

    def _on_all_ranks(self, merge: DRMMergeCallback, function: Callable[[], T]) -> T:
        """Calls a function on all processes of the strategy, which start here unless something else started them."""

        def joined() -> T:
            self.strategy.connect(LightningModule())  # a strategy that shards wants one to tell of its mesh
            self.strategy.setup_environment()
            self._ranks = merge.join(self.world_size)
            return function()

        launcher = self.strategy.launcher
        if launcher is None:
            return joined()
        try:
            return cast(T, launcher.launch(joined, trainer=self))
        except BaseException:
            launcher.kill(SIGTERM)
            raise

    def _measure_again(
        self, merge: DRMMergeCallback, folder: RunFolder, template: LightningModule, datamodule: MultiTaskDataModule
    ) -> Mapping[str, float]:
        merge.restore()
        base: Accuracies = {}
        individual: Accuracies = {}
        for task in merge.tasks:
            base[task], individual[task] = self._measure_stored(template, datamodule.tasks[task], task, merge, folder)
        module = self._fresh_module(template, datamodule.tasks[merge.tasks[0]])
        head = head_names_of(module, merge.head)
        heads = read_merged(folder.merged, module, head, merge.tasks)
        merged = self._measure(MultiTaskModule.assemble(module, head, {}, heads), datamodule, "merged · test")
        return self._report(merge, folder, base, individual, merged)

    def _finetune(
        self,
        template: LightningModule,
        data: LightningDataModule,
        task: str,
        merge: DRMMergeCallback,
        settings: Mapping[str, object],
        base_batches: int,
    ) -> None:
        folder = _folder_of(merge)
        start = time.perf_counter()
        module = self._fresh_module(template, data)
        module.task_name, module.finetune_settings = task, dict(settings)  # type: ignore[assignment]
        callbacks = [copy.deepcopy(callback) for callback in self._given_callbacks if callback is not merge]
        arguments = {
            "default_root_dir": folder.task(task),
            **{name: value for name, value in self._arguments.items() if value is not None},
            "strategy": self._own_strategy(),
            "callbacks": [*callbacks, merge, *self._progress_bar(f"{task} · finetune")],
        }
        if arguments.get("logger"):
            arguments["logger"] = copy.deepcopy(arguments["logger"])
        trainer = Trainer(**arguments)
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - start
        if isinstance(trainer.strategy, FSDPStrategy):
            finetuned = merge.finetuned_module(self._fresh_module(template, data), task)
        else:
            finetuned = MultiTaskModule({task: module})
        accuracy = self._measure(finetuned, data, f"{task} · test")[task]
        self._say(f"{task}: accuracy {100 * accuracy:.1f} %, finetuned in {seconds:.0f} s")
        del module, finetuned, trainer
        gc.collect()  # a Trainer and its module refer to each other, and would stay until the collector's next turn
        base = self._probe_base(template, data, task, merge, base_batches)
        if is_writer():
            folder.write_metrics(task, {"individual": accuracy, "base": base, "finetune_seconds": round(seconds, 1)})
        self._ranks.wait()

    def _probe_base(
        self, template: LightningModule, data: LightningDataModule, task: str, merge: DRMMergeCallback, max_batches: int
    ) -> float | None:
        """Accuracy of the untouched backbone with a linear head trained on it; ``None`` where that is not cheap."""
        if max_batches <= 0:
            return None
        module = self._fresh_module(template, data)
        head = head_names_of(module, merge.head)
        base = MultiTaskModule.assemble(module, head, {}, {task: head_state(module, head)})
        if isinstance(self.strategy, ModelParallelStrategy):
            base.shard(data_parallel(self.strategy.device_mesh))
        base.to(self.strategy.root_device)
        state = linear_probe(base.task_module(task), head, data.train_dataloader(), max_batches)
        if state is None:
            return None
        if is_writer():
            write_tensors(_folder_of(merge).base_head(task), state)
        for name, tensor in head_state(base.task_module(task), head).items():
            tensor.data.copy_(state[name])
        return self._measure(base, data, f"{task} · base")[task]

    def _merge_and_report(
        self, merge: DRMMergeCallback, folder: RunFolder, template: LightningModule, datamodule: MultiTaskDataModule
    ) -> None:
        if not merge.is_merged:
            module = self._fresh_module(template, datamodule.tasks[merge.tasks[0]])
            merge.fuse(module, device=self.strategy.root_device)
        metrics = self.strategy.broadcast(
            {task: folder.read_metrics(task) for task in merge.tasks} if is_writer() else {}
        )
        base = {task: metrics[task]["base"] for task in merge.tasks}
        individual = {task: metrics[task]["individual"] for task in merge.tasks}
        merged = self._measure(merge.merged_module, datamodule, "merged · test")
        self._report(merge, folder, base, individual, merged)

    def _report(
        self,
        merge: DRMMergeCallback,
        folder: RunFolder,
        base: Accuracies,
        individual: Accuracies,
        merged: Mapping[str, float],
    ) -> dict[str, float]:
        method = merge.recipe.description(merge.tasks)
        comparison = Comparison(merge.tasks, base, individual, merged, method)
        metrics = logged_metrics(comparison)
        if is_writer():
            write_report(comparison, folder.path)
        for logger in self.loggers:
            logger.log_hyperparams(method)
            logger.log_metrics(metrics)
            logger.save()
        self._console.print(terminal_table(comparison))
        self._say(f"Report: {folder.path}/report.md, report.png, report.json. Merged model: {folder.merged}")
        return metrics

    def _say(self, sentence: str) -> None:
        self._console.print(sentence, soft_wrap=True)

    def _measure(self, module: MultiTaskModule, data: LightningDataModule, label: str) -> dict[str, float]:
        # FSDP1 would take the module over for good, and the merged one is the user's.
        strategy = "ddp" if isinstance(self.strategy, FSDPStrategy) else self._own_strategy()
        arguments = {**self._arguments, "strategy": strategy}
        return measure(module, data, arguments, self._progress_bar(label))

    def _own_strategy(self) -> Any:
        """The strategy as it was given, for a Trainer of its own."""
        return copy.deepcopy(self._arguments["strategy"])

    def _measure_stored(
        self,
        template: LightningModule,
        data: LightningDataModule,
        task: str,
        merge: DRMMergeCallback,
        folder: RunFolder,
    ) -> tuple[float | None, float]:
        """Accuracy of the base (``None`` if it has no head) and of the finetune, rebuilt from the run folder."""
        module = self._fresh_module(template, data)
        head = head_names_of(module, merge.head)
        base = None
        if folder.base_head(task).is_file():
            state = load_file(folder.base_head(task))
            untouched = MultiTaskModule.assemble(module, head, {}, {task: state})
            base = self._measure(untouched, data, f"{task} · base")[task]
        individual = merge.finetuned_module(module, task)
        return base, self._measure(individual, data, f"{task} · test")[task]

    def _fresh_module(self, template: LightningModule, data: LightningDataModule) -> LightningModule:
        """A copy of the template for a task, with the same weights each time."""
        self._reseed()
        module = duplicate(template)
        if hasattr(module, "configure_task"):
            if self.local_rank == 0 if data.prepare_data_per_node else is_writer():
                data.prepare_data()
            self._ranks.wait()
            data.setup("fit")
            if not hasattr(data, "num_classes"):
                raise ValueError(f"{type(data).__name__} has no `num_classes`, which {type(module).__name__} asks for.")
            cast(Any, module).configure_task(data.num_classes)
        return module

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _reseed(self) -> None:
        seed_everything(self._seed, workers=bool(int(os.environ.get("PL_SEED_WORKERS", 0))), verbose=False)

    def _settings(self, model: LightningModule, datamodule: MultiTaskDataModule, task: str) -> dict[str, Any]:
        return dict(finetune_settings(model, datamodule.tasks[task], self._arguments, self._seed))

    def _progress_bar(self, label: str) -> list[Callback]:
        shown = self._arguments.get("enable_progress_bar") is not False and is_writer()
        own = any(isinstance(callback, ProgressBar) for callback in self._given_callbacks)
        return [TaskProgressBar(label)] if shown and not own else []

    def _merge_callback(self, datamodule: MultiTaskDataModule) -> tuple[DRMMergeCallback, RunFolder]:
        found = [callback for callback in self._given_callbacks if isinstance(callback, DRMMergeCallback)]
        if len(found) != 1:
            raise ValueError(f"MergeTrainer needs one DRMMergeCallback among its callbacks, got {len(found)}.")
        merge = found[0]
        if merge.tasks != datamodule.task_names:
            raise ValueError(f"The callback's tasks {merge.tasks} are not the data module's {datamodule.task_names}.")
        refuse_strategy(self.strategy)
        return merge, _folder_of(merge)


def is_writer() -> bool:
    """Whether this process writes and prints: Trainers that run know their rank, the one that starts them does not."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _locked(folder: RunFolder, tasks: Sequence[str]) -> AbstractContextManager[None]:
    """Keeps other runs from these tasks; the process that writes does it for all of this one's."""
    return folder.locked(tasks) if is_writer() else nullcontext()


def _folder_of(merge: DRMMergeCallback) -> RunFolder:
    if merge.run_folder is None:
        raise ValueError("MergeTrainer keeps finished tasks in a run folder: give DRMMergeCallback a dirpath.")
    return merge.run_folder


def _chosen(tasks: list[str], only: str | list[str] | None) -> list[str]:
    wanted = tasks if only is None else [only] if isinstance(only, str) else only
    if unknown := sorted(set(wanted) - set(tasks)):
        raise ValueError(f"No task {', '.join(map(repr, unknown))} to finetune; tasks: {', '.join(tasks)}.")
    return [task for task in tasks if task in wanted]


def _require_done(folder: RunFolder, tasks: list[str]) -> None:
    if missing := folder.missing(tasks):
        raise ValueError(f"{folder.path} has no finetune of {', '.join(missing)}: run `fit` first.")


def _still_valid(folder: RunFolder, settings: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The tasks that are done; refuses those that were done with other settings."""
    done = [task for task in settings if folder.is_done(task)]
    changes = {task: changed_settings(folder.load_task_vector(task).settings, settings[task]) for task in done}
    problems = [f"  {task}: {'; '.join(lines)}" for task, lines in changes.items() if lines]
    if problems:
        raise ValueError(
            f"{folder.path} has finetunes made with other settings:\n"
            + "\n".join(problems)
            + "\nFinetune them again with --retrain true, or choose another run folder with --drm.dirpath."
        )
    return done
