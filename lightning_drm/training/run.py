"""One call of `MergeTrainer`: what it works with, how its tasks are measured, and how it reports."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_drm.data import MultiTaskDataModule
from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation import (
    Comparison,
    Finding,
    MadeFrom,
    Published,
    Score,
    Split,
    StoredFinding,
    Study,
    add_section,
    logged_metrics,
    report_figure,
    terminal_table,
    write_finding,
    write_page,
    write_report,
)
from lightning_drm.fusion import Recipe, method_title
from lightning_drm.training.chosen_weights import Weights, callbacks_of, ends_with
from lightning_drm.training.collect_statistics import collect_statistics, training_samples
from lightning_drm.training.figure_log import log_figures
from lightning_drm.training.interruption import Interruptible
from lightning_drm.training.letting_go import let_go
from lightning_drm.training.merged_card import add_scores
from lightning_drm.training.propagation import propagated
from lightning_drm.training.run_folder import RunFolder
from lightning_drm.training.scoring import Scoring
from lightning_drm.training.session import MergeSession
from lightning_drm.training.snapshots import SnapshotPlan
from lightning_drm.training.statistics import StatisticsPlan, missing
from lightning_drm.training.task_modules import TaskModules


@dataclass(frozen=True)
class Run:
    """What one call of `MergeTrainer` works with.

    Attributes:
        trainer: The Trainer, whose strategy and loggers are used.
        session: What was collected.
        folder: Where it is stored.
        data: The tasks' data.
        modules: Makes the tasks' modules.
        scoring: Measures models.
        interruptible: Tells whether a signal has come.
        weights: Which weights of a fit are merged.
        snapshots: When a fit's snapshots are taken, and what becomes of them.
        statistics: Which statistics of the training data are collected.
        published: What was published about the model, for runs that repeat the paper's experiments.
        console: Where sentences are printed.
    """

    trainer: Trainer
    session: MergeSession
    folder: RunFolder
    data: MultiTaskDataModule
    modules: TaskModules
    scoring: Scoring
    interruptible: Interruptible
    weights: Weights
    snapshots: SnapshotPlan
    statistics: StatisticsPlan
    published: Published | None
    console: Console

    @property
    def made_from(self) -> MadeFrom:
        """What a report or a study is about, if it is made now."""
        return self.folder.made_from(self.session.tasks)

    def measure(self, task: str, module: LightningModule | None, base_batches: int, start: float) -> None:
        """Measures a collected task, which is done then; `module` is the trained one, if it was trained here."""
        seconds = round(time.perf_counter() - start, 1) if module is not None else None
        ends_as_stored = module is not None and ends_with(self.weights, callbacks_of(module.trainer))
        score = self.scoring.finetuned(task, module if ends_as_stored else None)
        self.interruptible.check()
        how = f"finetuned in {seconds:.0f} s" if seconds is not None else "finetuned before, measured now"
        self.say(f"{task}: {score}, {how}")
        del module
        let_go()
        base = self.scoring.base(task, base_batches)
        self.interruptible.check()
        if is_writer():
            scores = {"individual": score, "base": base, "finetune_seconds": seconds}
            self.folder.write_metrics(task, {**scores, **self.scoring.stamp(task)})
        self.session.ranks.wait()

    def collect_statistics(self, task: str) -> None:
        """Collects those statistics of a finetuned task that are to be there and are not, from its stored deltas."""
        needs, how = self.statistics.of(self.session.recipe.method)
        lacking = missing(self.session.task_vectors[task], needs, how)
        if not lacking:
            return
        start, strategy = time.perf_counter(), self.trainer.strategy
        finetuned = self.session.finetuned(self.modules.fresh(task), task).to(strategy.root_device)
        collect_statistics(
            self.session,
            finetuned.task_module(task),
            task,
            partial(self.modules.training_loader, task, self.trainer),
            lacking,
            how,
            strategy=strategy,
            data=self.data.tasks[task],
        )
        self.interruptible.check()
        seconds = time.perf_counter() - start
        self.say(f"{task}: statistics ({', '.join(lacking)}) of {how.num_samples} training samples, in {seconds:.0f} s")

    def vectors_for(self, recipe: Recipe) -> dict[str, TaskVector]:
        """The task vectors, with the statistics that the recipe's method takes from the merge itself, if it does."""
        session, modules, strategy = self.session, self.modules, self.trainer.strategy
        if not recipe.method.propagate:
            return session.task_vectors
        finetuned = {
            task: session.finetuned(modules.fresh(task), task).to(strategy.root_device).task_module(task)
            for task in session.tasks
        }
        _, how = self.statistics.of(recipe.method)
        batches = {
            task: training_samples(
                partial(modules.training_loader, task, self.trainer),
                task,
                how.num_samples,
                session.ranks,
                strategy,
                self.data.tasks[task],
            )
            for task in session.tasks
        }
        number = how.num_samples
        self.say(f"Statistics of {number} samples of each task, block by block, through the merged blocks before")
        return propagated(session, recipe, modules.make_known().to(strategy.root_device), finetuned, batches, how)

    def scores(self, task: str, *, again: bool = False) -> dict[str, Any]:
        """A finished task's scores as they are stored; measured again if asked, or where data or deltas are others."""
        found = (self.folder.read_metrics(task), self.scoring.stamp(task)) if is_writer() else ({}, {})
        stored, stamp = self.trainer.strategy.broadcast(found)
        if not again and stamp.items() <= stored.items():
            return stored
        if not again:
            self.say(
                f"{task}: its scores are of other test data, of another metric, or of other settings of the module, so "
                "it is measured again"
            )
        scores = {**stored, "individual": self.scoring.finetuned(task), "base": self.scoring.stored_base(task), **stamp}
        if is_writer():
            self.folder.write_metrics(task, scores)
        return scores

    def stamps(self, tasks: Sequence[str], split: Split) -> dict[str, dict[str, Any]]:
        """By task, what scores of merges depend on beside the recipe.

        Args:
            tasks: The tasks.
            split: On whose samples they are measured.
        """
        found: dict[str, dict[str, Any]] = {}
        for task in tasks:
            statistics = self.session.task_vectors[task].statistics
            found[task] = {
                **self.scoring.stamp(task, split),
                "batch_norm_batches": self.session.batch_norm_batches,
                "statistics": {n: asdict(how) for n, how in statistics.collected.items()} if statistics else {},
            }
        return found

    def merge_and_report(self) -> None:
        """Merges by the session's recipe, and reports."""
        earlier = self.folder.merge_record
        merged = self.session.fuse(
            module=self.modules.make_known(),
            device=self.trainer.strategy.root_device,
            batch_norm=self.modules.training_batches(self.trainer),
            vectors=self.vectors_for(self.session.recipe),
        )
        if earlier is not None and earlier != self.folder.merge_record:
            self.say(f"The merge before this one, with its report: {self.folder.history_of(earlier)}")
        scores = {task: self.scores(task) for task in self.session.tasks}
        self.report(scores, self.scoring.merged(merged))

    def report(self, scores: Mapping[str, Mapping[str, Any]], merged: Mapping[str, Score]) -> dict[str, float]:
        """Writes, logs and prints the report.

        Args:
            scores: What `scores` gave, by task.
            merged: The merged model's score by task.

        Returns:
            What was logged.
        """
        method = self.session.recipe.description(self.session.tasks)
        base, individual = ({task: scores[task][row] for task in scores} for row in ("base", "individual"))
        title = method_title(self.session.recipe.method)
        comparison = Comparison(self.session.tasks, base, individual, merged, method, title)
        metrics = logged_metrics(comparison)
        folder = self.folder
        if is_writer():
            write_report(comparison, folder.path, self.made_from)
            add_scores(folder.merged / "README.md", comparison)
        for logger in self.trainer.loggers:
            logger.log_hyperparams(method)
            logger.log_metrics(metrics)
            logger.save()
        if is_writer() and self.trainer.loggers:
            log_figures({"merge/scores": report_figure(comparison)}, self.trainer.loggers)
        self.console.print(terminal_table(comparison))
        self.say(f"Report: {folder.path}/report.html, report.md, report.json. Merged model: {folder.merged}")
        return metrics

    def keep(
        self,
        study: Study,
        findings: Sequence[Finding],
        section: Mapping[str, Any] | None = None,
        *,
        with_scores: bool = True,
    ) -> list[StoredFinding]:
        """Writes what a study found, takes it up into the report, and logs its figures.

        Args:
            study: The study, whose folder in the run folder takes the findings.
            findings: What was found.
            section: What the study adds to ``report.json``, if it does.
            with_scores: Whether the findings depend on scores.

        Returns:
            The findings' files.
        """
        folder, made_from = self.folder.path, self.made_from
        stored = [write_finding(finding, folder / study, made_from, with_scores=with_scores) for finding in findings]
        if section is None:
            write_page(folder, made_from)
        else:
            metrics = {task: self.folder.read_metrics(task)["individual"].metric for task in self.session.tasks}
            add_section(study, section, folder, metrics=metrics, made_from=made_from)
        log_figures({f"{study}/{finding.name}": finding.figure for finding in findings}, self.trainer.loggers)
        return stored

    def say_where(self, study: Study) -> None:
        """Says where a study's figures and tables are."""
        self.say(f"Figures and tables: {self.folder.path / study}. Report: {self.folder.path}/report.html")

    def say(self, sentence: str) -> None:
        """Prints a sentence, in the process that writes."""
        self.console.print(sentence, soft_wrap=True)


def is_writer() -> bool:
    """Whether this process writes and prints: Trainers that run know their rank, the one that starts them does not."""
    return getattr(rank_zero_only, "rank", 0) == 0
