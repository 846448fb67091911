"""Lightning's Trainer for several tasks: finetune each, merge, test, report.

The orchestration only: a fresh Trainer and a fresh module per task (a Trainer fits once), the same seed before each,
and a run folder that remembers what is done. A model goes one way: this Trainer makes each task's module
(`task_modules`), the session collects and fuses (`session`), and the outcome is measured (`scoring`).

Under a strategy of several processes, all of them go through all of it together, from before the first fit to the
report. One rank reads and writes the run folder, since the others may see new files late.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from typing_extensions import override

from lightning_drm.analysis import Analysis, chosen_analyses
from lightning_drm.data import MultiTaskDataModule, require_validation_sets
from lightning_drm.deltas.compiled import uncompiled
from lightning_drm.evaluation import Split, StoredFinding
from lightning_drm.merging import Method
from lightning_drm.modules import MultiTaskModule, unmeasurable
from lightning_drm.storage import writing
from lightning_drm.training.all_ranks import on_all_ranks
from lightning_drm.training.analyses import run_analyses
from lightning_drm.training.callback import DRMMergeCallback
from lightning_drm.training.candidates import RunCandidates
from lightning_drm.training.chosen_weights import settings_of
from lightning_drm.training.collect import CollectTask
from lightning_drm.training.comparing import compare_methods
from lightning_drm.training.failures import Failures
from lightning_drm.training.finished import finished_tasks, require_done, require_merged_as_configured
from lightning_drm.training.foreign import problem_of_class
from lightning_drm.training.interruption import Interruptible
from lightning_drm.training.progress import TaskProgressBar
from lightning_drm.training.run import Run, is_writer
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.scoring import Scoring
from lightning_drm.training.settings import callback_settings, finetune_settings
from lightning_drm.training.snapshot_merges import merge_snapshots, require_measurable
from lightning_drm.training.snapshots import TakeSnapshots
from lightning_drm.training.strategies import refuse_strategy
from lightning_drm.training.task_fit import TaskFit
from lightning_drm.training.task_modules import TaskModules
from lightning_drm.training.tuned import search_of, tune_and_test
from lightning_drm.tuning import SearchOptions

T = TypeVar("T")


class MergeTrainer(Trainer):
    """Finetunes every task of a `MultiTaskDataModule`, merges, and tests base, individual and merged models.

    It takes the arguments of Lightning's Trainer, which hold for each task's fit, and needs one `DRMMergeCallback` with
    a ``dirpath`` among its callbacks. With a single task's data, ``fit`` and ``test`` are those of Lightning's Trainer.

    Under ``FSDPStrategy`` (FSDP1) tasks are trained sharded, and tested whole on every process, as under ``ddp``.

    Args:
        kwargs: Arguments of ``lightning.Trainer``.

    Attributes:
        on_accepted: Called by a fit of several tasks once nothing of it was refused, before anything is trained, in the
            process that writes.
    """

    def __init__(self, **kwargs: Any) -> None:
        given = kwargs.get("callbacks") or []
        self._given_callbacks = list(given) if isinstance(given, Sequence) else [given]
        # Lightning adds to the list of callbacks that it got, and a strategy serves one Trainer.
        self._arguments = {**kwargs, "callbacks": self._given_callbacks}
        self._task_callbacks = [
            callback for callback in self._given_callbacks if not isinstance(callback, DRMMergeCallback)
        ]
        self._arguments["strategy"] = copy.deepcopy(kwargs.get("strategy", "auto"))
        super().__init__(**kwargs)
        self._console = Console(quiet=not is_writer(), highlight=False)
        self.on_accepted: Callable[[], None] = lambda: None

    @override
    def fit(  # type: ignore[override]  # some of Lightning's arguments come as keywords, and others are this class's own
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        *,
        only: str | list[str] | None = None,
        retrain: bool = False,
        resume: bool = True,
        keep_going: bool = True,
        base_batches: int = 40,
        **kwargs: Any,
    ) -> None:
        """Finetunes each task from the same base, then merges and tests. Tasks already done are not trained again.

        Args:
            model: Template of a task's module, or `torch.compile` of it. Each task trains a copy of it, whose
                ``configure_for(data)``, if it has one, is called with the task's data; or its
                ``configure_task(num_classes)`` with their number of classes.
            train_dataloaders: As in Lightning, for a single task.
            val_dataloaders: As in Lightning, for a single task.
            datamodule: The tasks.
            only: Finetune this task, or these, and stop without merging (one job of a cluster's array, say).
            retrain: Finetune tasks again that the run folder already has.
            resume: Go on inside a task whose fit was killed, from the last checkpoint that was made when an epoch
                ended; the result is that of an undisturbed fit. Otherwise the task is trained from the start.
            keep_going: Finetune the other tasks where one fails by its data or settings; the end says what is
                missing, and nothing is merged. Several processes end at the first failure, as others would wait.
            base_batches: Training batches that the head on the untouched base may see; 0 leaves the base out where a
                task has a head.
            kwargs: Further arguments of Lightning's ``fit``, for a single task.

        Raises:
            ValueError: If the module, the tasks, the callback and the run folder do not fit together, or tasks failed.
            ExceptionGroup: If tasks failed by a bug, with its traceback.
        """
        if problem := problem_of_class(type(model)):
            raise ValueError(problem)
        if not isinstance(datamodule, MultiTaskDataModule):
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, **kwargs)
            return
        if problem := unmeasurable(uncompiled(model)):
            raise ValueError(problem)
        run = self._run_of(model, datamodule)
        if run.snapshots.merge:
            require_measurable(run)
        session, folder = run.session, run.folder
        tasks = _chosen(session.tasks, only)
        settings = {task: self._settings(run, task) for task in tasks}

        def finetune_and_merge(done: list[str], collected: list[str], checkpoints: dict[str, Path]) -> None:
            failures = Failures(keep_going and session.ranks.size == 1)
            session.restore([*done, *collected])
            for task in tasks:
                if task in done:
                    score = folder.read_metrics(task)["individual"]
                    run.say(f"{task}: finetuned before ({score}), not trained again")
                    with failures.of(task):
                        run.collect_statistics(task)
                    continue
                run.interruptible.unfinished = f"task {task!r} was"
                with failures.of(task):
                    start, module = time.perf_counter(), None
                    if task not in collected:
                        module = self._finetune(run, task, settings[task], checkpoints.get(task))
                    run.measure(task, module, base_batches, start)
                    module = None
                    run.collect_statistics(task)
                module = None
            failures.report(tasks)
            if only is None:
                run.interruptible.unfinished = "all tasks are finetuned, but the merge was"
                if run.snapshots.merge:
                    merge_snapshots(run)
                run.merge_and_report()

        with run.interruptible, _locked(folder, tasks):
            finished = finished_tasks(
                folder, settings, retrain, resume, lambda task, begun: self._fit_of(run, task, begun).last_checkpoint()
            )
            if is_writer():
                self.on_accepted()
            on_all_ranks(self, session, lambda: finetune_and_merge(*self.strategy.broadcast(finished)))
        if only is None:
            return
        if missing := folder.missing(session.tasks):
            run.say(f"In {folder.path}: {', '.join(missing)} still to be finetuned.")
        else:
            run.say(f"All tasks in {folder.path} are finetuned; `merge` comes next.")

    def collect(
        self, model: LightningModule, datamodule: MultiTaskDataModule, *, only: str | list[str] | None = None
    ) -> None:
        """Collects statistics of the finetuned tasks' training data, for the methods that need them. Trains nothing.

        Which ones the callback's ``statistics`` say, and the configured method. `fit` collects them by itself; this is
        for tasks that were finetuned without. Those that are there already are not collected again.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.
            only: This task, or these.

        Raises:
            ValueError: If tasks are not finetuned yet, nothing is to be collected, or a module does not give it.
        """
        run = self._run_of(model, datamodule)
        tasks = _chosen(run.session.tasks, only)
        if not run.statistics.of(run.session.recipe.method)[0]:
            raise ValueError(
                f"There is nothing to collect: {type(run.session.recipe.method).__name__} needs no statistics, and "
                "drm.statistics names none (gram, fisher)."
            )
        require_done(run.folder, tasks)

        def collect_each() -> None:
            run.session.restore(tasks)
            for task in tasks:
                run.interruptible.unfinished = f"the statistics of task {task!r} were"
                run.collect_statistics(task)

        with run.interruptible, _locked(run.folder, tasks):
            on_all_ranks(self, run.session, collect_each)
        run.say(f"The statistics of {', '.join(tasks)} are in {run.folder.path}/tasks.")

    def merge(self, model: LightningModule, datamodule: MultiTaskDataModule) -> None:
        """Merges the finetuned tasks again, with any method, and tests. Trains nothing.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.

        Raises:
            ValueError: If tasks are not finetuned yet.
        """
        run = self._run_of(model, datamodule)
        require_done(run.folder, run.session.tasks)

        def restore_and_merge() -> None:
            run.session.restore(run.session.tasks)
            run.merge_and_report()

        with run.interruptible, _locked(run.folder, run.session.tasks):
            on_all_ranks(self, run.session, restore_and_merge)

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
            ValueError: If tasks are not finetuned yet, or were merged in another way than the configuration says.
            FileNotFoundError: If they are not merged yet.
        """
        if model is None or isinstance(model, MultiTaskModule) or not isinstance(datamodule, MultiTaskDataModule):
            return super().test(model, dataloaders, datamodule=datamodule, **kwargs)
        run = self._run_of(model, datamodule)
        require_done(run.folder, run.session.tasks)
        require_merged_as_configured(run.folder, run.session)

        def measure_again() -> list[Mapping[str, float]]:
            run.session.restore(run.session.tasks)
            scores = {task: run.scores(task, again=True) for task in run.session.tasks}
            return [run.report(scores, run.scoring.stored_merged())]

        with run.interruptible, _locked(run.folder, run.session.tasks):
            return on_all_ranks(self, run.session, measure_again)

    def compare(
        self,
        model: LightningModule,
        datamodule: MultiTaskDataModule,
        *,
        methods: list[Method] | None = None,
        split: Split = "validation",
    ) -> None:
        """Compares methods side by side on what `fit` stored, with intervals. Trains nothing, and keeps no model.

        The configured method comes first. All share the rest of the recipe: coefficients, convolutions, what is done to
        parameters that are no matrices, and overrides.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.
            methods: The methods to compare with the configured one, as names (each with its defaults) or as class_path
                with init_args. All methods of this package if left out, with DRM in both directions.
            split: The samples to measure on: ``validation``, so that test sets stay unseen, or ``test``.

        Raises:
            ValueError: If tasks are not finetuned yet, or methods are given twice or do not fit the overrides.
        """
        self._study(model, datamodule, lambda run, candidates: compare_methods(run, candidates, methods), split=split)

    def tune(
        self,
        model: LightningModule,
        datamodule: MultiTaskDataModule,
        *,
        methods: list[str] | None = None,
        grid: dict[str, dict[str, list[bool | int | float | str]]] | None = None,
        coefficients: Literal["one", "each", "layers"] | None = None,
        search: Literal["grid", "tpe", "gradient"] = "grid",
        num_trials: int | None = None,
        seed: int | None = None,
        num_samples: int | Literal["auto"] | None = "auto",
        num_finalists: int | None = None,
        prune: bool | None = None,
        objective: Literal["labels", "entropy"] | None = None,
        initial_coefficient: float | None = None,
        learning_rate: float | None = None,
        max_steps: int | None = None,
        patience: int | None = None,
    ) -> None:
        """Searches for the best merge of the finetuned tasks on their validation sets, and tests it once.

        The score of a setting is the average over tasks of its score divided by that of the task's own finetune. All
        settings are measured on a sample of the validation sets, and the best few on all of their samples. The search
        is kept in ``<run>/tune/``: after a kill the same command continues.

        The search ``gradient`` learns coefficients by a fit instead (AdaMerging, arXiv 2310.02575), on one half of each
        task's validation samples, and stops when the loss on the other half no longer falls. It holds the base and one
        dense delta per task in memory. A fit that was killed begins anew, with the same seed; what was learned is kept.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.
            methods: Methods to search, by name, with the paper's grids (DRM in both directions); ``all`` of them; a
                step around another method as ``SVC of DRM``. If left out, those of the grid, and without a grid the
                configured method, in its direction if it is DRM. ``gradient`` takes one, which must be linear in the
                coefficients, as DRM, TIES and task arithmetic are.
            grid: By method, and by hyper-parameter, a list of the values to try. It takes the place of the method's
                default grid. Of ``SVC of DRM``, those of DRM are ``method.density`` and so on. Not for ``gradient``.
            coefficients: Search ``one`` λ for all tasks, which is the method's ``scale``; one for ``each`` task, which
                needs the search ``tpe`` or ``gradient``; or one for each task and parameter tensor, ``layers``, which
                needs ``gradient``. If left out, ``one``; of ``gradient``, ``layers``.
            search: Try the whole ``grid``, or what ``tpe`` (Optuna) proposes between its lowest and highest values, or
                learn coefficients by ``gradient``.
            num_trials: How many settings ``tpe`` proposes of each method, earlier calls included; 100 if left out. For
                ``tpe`` only.
            seed: Decides what ``tpe`` proposes, or which samples ``gradient`` learns from, and their order; 0 if left
                out. Not for a grid.
            num_samples: How many validation samples of each task measure a setting, or take part in learning, classes
                in proportion; null uses all, ``auto`` 100 of them, and all for ``gradient``.
            num_finalists: How many of the best settings are measured on all validation samples; 5 if left out. Not for
                ``gradient``.
            prune: Give a setting up after some tasks if it cannot be among the best any more, whatever its scores on
                the other tasks; true if left out. The outcome is the same without. Not for ``gradient``.
            objective: What ``gradient`` learns by: on ``labels``, the loss of the tasks' own training_step; without
                labels, the ``entropy`` of predicted classes, which every task must have. ``labels`` if left out.
            initial_coefficient: Where ``gradient`` starts each λ (the paper: 0.3); at the configured coefficients times
                the method's scale if left out.
            learning_rate: That of ``gradient``, whose optimizer is Adam; 0.001 if left out.
            max_steps: How many steps ``gradient`` takes at most, each on 16 samples of every task; 500 if left out.
            patience: After how many checks in a row without a lower loss ``gradient`` stops, one every 10 steps; 5 if
                left out.

        Raises:
            ValueError: If tasks are not finetuned yet or have no validation set, or something cannot be searched.
        """
        given: dict[str, Any] = {
            "methods": methods,
            "grid": grid,
            "coefficients": coefficients,
            "num_trials": num_trials,
            "seed": seed,
            "num_finalists": num_finalists,
            "prune": prune,
            "objective": objective,
            "initial_coefficient": initial_coefficient,
            "learning_rate": learning_rate,
            "max_steps": max_steps,
            "patience": patience,
        }
        find = search_of(
            SearchOptions(search, num_samples, {name: v for name, v in given.items() if v is not None}),
            arguments=self._arguments,
            progress_bar=self._progress_bar,
        )
        self._study(model, datamodule, lambda run, found: tune_and_test(run, found, find))

    def analyze(
        self,
        model: LightningModule,
        datamodule: MultiTaskDataModule,
        *,
        only: str | list[str] | None = None,
        analyses: list[Analysis] | None = None,
        split: Split = "validation",
        num_samples: int | None = None,
    ) -> list[StoredFinding]:
        """Studies the stored deltas: the paper's tables and figures, each with what it says in one sentence.

        Args:
            model: Template of a task's module, as for ``fit``.
            datamodule: The tasks.
            only: Run this analysis, or these; all if left out.
            analyses: Analyses with options of their own, as ``class_path`` and ``init_args``. Each takes the place of
                the one with its default options; one of your own is added.
            split: Which samples measure a model, for analyses that need scores.
            num_samples: How many validation samples of each task measure a model, always the same ones, classes in
                proportion; all if left out.

        Returns:
            What was found, as it is stored in ``analysis/`` of the run folder.

        Raises:
            ValueError: If tasks are not finetuned yet, or an analysis is unknown, does not fit or failed.
        """
        chosen = chosen_analyses(only, analyses or [])
        return self._study(
            model,
            datamodule,
            lambda run, candidates: run_analyses(run, candidates, chosen),
            split=split,
            num_samples=num_samples,
            measured=any(analysis.needs_scores for analysis in chosen),
        )

    def _study(
        self,
        model: LightningModule,
        datamodule: MultiTaskDataModule,
        function: Callable[[Run, RunCandidates], T],
        *,
        split: Split = "validation",
        num_samples: int | None = None,
        measured: bool = True,
    ) -> T:
        """Studies merges of the finetuned tasks, on one process."""
        if self.world_size > 1:
            raise ValueError(
                f"Merges are studied on one device, got {self.world_size}: give --trainer.devices 1 and, for a "
                "strategy of several processes, --trainer.strategy auto."
            )
        if num_samples is not None and split == "test":
            raise ValueError("num_samples chooses samples of the validation sets: leave it out with the split 'test'.")
        run = self._run_of(model, datamodule)
        require_done(run.folder, run.session.tasks)
        if measured and split == "validation":
            require_validation_sets(datamodule)

        def studied() -> T:
            run.session.restore(run.session.tasks)
            with RunCandidates(run, split, num_samples) as candidates:
                return function(run, candidates)

        with run.interruptible, _locked(run.folder, run.session.tasks):
            return on_all_ranks(self, run.session, studied)

    def _finetune(
        self, run: Run, task: str, settings: Mapping[str, object], checkpoint: Path | None
    ) -> LightningModule:
        """Finetunes a task, or finishes it; returns its trained module."""
        fit = self._fit_of(run, task, settings)
        if checkpoint is None and is_writer():
            fit.remove_checkpoints()
            run.folder.begin(task, settings)
        module = run.modules.fresh(task)
        run.scoring.check(task, module)
        run.interruptible.check()
        if checkpoint is not None:
            run.say(f"{task}: going on from {checkpoint}")
        collect = CollectTask(run.session, task, settings, run.weights, run.statistics)
        snapshots = TakeSnapshots(run.session, task, run.snapshots, settings)
        trainer = fit.trainer([collect, snapshots, *self._progress_bar(f"{task} · finetune")])
        requeued = fit.requeued()
        try:
            with writing(run.folder.task(task)):  # its logs among other things
                compiled = run.modules.compiled(module)
                trainer.fit(compiled, datamodule=run.data.tasks[task], ckpt_path=checkpoint, weights_only=False)
        except SIGTERMException:
            run.interruptible.requeued = fit.requeued() != requeued
            raise
        run.interruptible.check()
        return module

    def _fit_of(self, run: Run, task: str, settings: Mapping[str, Any]) -> TaskFit:
        return TaskFit(task, run.folder.task(task), self._arguments, self._task_callbacks, settings)

    def _settings(self, run: Run, task: str) -> dict[str, Any]:
        seed = run.modules.seed
        settings = finetune_settings(run.modules.template, run.data.tasks[task], self._arguments, seed)
        counted = callback_settings(self._task_callbacks, averaged=run.weights == "averaged")
        return {**settings, **counted, **settings_of(run.weights, self._task_callbacks)}

    def _progress_bar(self, label: str) -> list[Callback]:
        shown = self._arguments.get("enable_progress_bar") is not False and is_writer()
        own = any(isinstance(callback, ProgressBar) for callback in self._given_callbacks)
        return [TaskProgressBar(label)] if shown and not own else []

    def _run_of(self, model: LightningModule, data: MultiTaskDataModule) -> Run:
        found = [callback for callback in self._given_callbacks if isinstance(callback, DRMMergeCallback)]
        if len(found) != 1:
            raise ValueError(f"MergeTrainer needs one DRMMergeCallback among its callbacks, got {len(found)}.")
        session = found[0].session
        if session.tasks != data.task_names:
            raise ValueError(f"The callback's tasks {session.tasks} are not the data module's {data.task_names}.")
        if session.run_folder is None:
            raise ValueError("MergeTrainer keeps finished tasks in a run folder: give DRMMergeCallback a dirpath.")
        refuse_strategy(self.strategy)
        modules = TaskModules(model, data, session, self.strategy)
        arguments, strategy, bar = self._arguments, self.strategy, self._progress_bar
        scoring = Scoring(session, session.run_folder, modules, data, arguments, strategy, bar)
        return Run(
            self,
            session,
            session.run_folder,
            data,
            modules,
            scoring,
            Interruptible("the run was"),
            found[0].weights,
            found[0].snapshots,
            found[0].statistics,
            found[0].published,
            self._console,
        )


def _locked(folder: RunFolder, tasks: Sequence[str]) -> AbstractContextManager[None]:
    """Keeps other runs from these tasks; the process that writes does it for all of this one's."""
    return folder.locked(tasks) if is_writer() else nullcontext()


def _chosen(tasks: list[str], only: str | list[str] | None) -> list[str]:
    wanted = tasks if only is None else [only] if isinstance(only, str) else only
    if unknown := sorted(set(wanted) - set(tasks)):
        raise ValueError(f"No task {', '.join(map(repr, unknown))} to finetune; tasks: {', '.join(tasks)}.")
    return [task for task in tasks if task in wanted]
