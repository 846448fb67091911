"""A study: eight text tasks, full finetuning and LoRA, three seeds, and every method untuned and tuned.

    pip install -e '.[study]' && python examples/study/run.py

Each step is a ``lightning-drm`` command on a run folder of its own, ``runs/study/full-0`` and so on; README.md beside
this file says what came out. Stop the script and start it again: it goes on where it was.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import auto_cli
from report import Studied, write_results

import lightning_drm
from lightning_drm.fusion import method_title
from lightning_drm.fusion.recipe import class_path, plain_arguments
from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, Method, TaskArithmetic
from lightning_drm.storage import write_text
from lightning_drm.tuning.nesting import Nesting

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
FINETUNING = {"full": [CONFIGS / "study.yaml"], "lora": [CONFIGS / "study.yaml", CONFIGS / "study_lora.yaml"]}

Grids = Mapping[str, Mapping[str, Sequence[Any]]]

METHODS = [DRM(), DRM("vertical"), TIES(), DARETIES(), TaskArithmetic(), Average(), IsoC(), IsoCTS(), TSVM()]

DENSITIES = [0.1, 0.2, 0.4]
SCALES = [0.8, 1.0, 1.5, 2.0]
GRIDS: Grids = {
    "DRM": {"direction": ["horizontal", "vertical"], "density": DENSITIES, "scale": SCALES},
    "TIES": {"density": DENSITIES, "scale": SCALES},
    "DARETIES": {"density": DENSITIES, "scale": SCALES},
    "TaskArithmetic": {"scale": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "IsoC": {"scale": SCALES},
    "IsoCTS": {"scale": SCALES},
    "TSVM": {"scale": SCALES},
}
"""Coarser than the paper's grids, which would take hours with three seeds; its ranges, and a λ of 2.0 beyond them."""

TUNING_SAMPLES = 50

ABLATION = {
    "class_path": "lightning_drm.analysis.Ablation",
    "init_args": {"directions": ["horizontal"], "rank_drops": [0.5, 0.9]},
}
TASKS = {
    "class_path": "lightning_drm.analysis.Tasks",
    "init_args": {"baselines": ["TIES", "TSVM", "Average"], "most_subsets": 2},
}
OF_ALL_SEEDS = ["ablation", "trajectory"]
OF_FIRST_SEED = ["tasks", "pruning_profile", "sign_agreement", "spectrum", "alignment"]


@dataclass(frozen=True)
class Run:
    """One run folder and its commands.

    Attributes:
        finetuning: ``full`` or ``lora``.
        seed: The seed of finetuning.
        folder: The run folder.
        words: The options that all of its commands have.
        workers: How many runs share the cores.
    """

    finetuning: str
    seed: int
    folder: Path
    words: Sequence[str]
    workers: int

    def do(self, command: str, *options: str) -> None:
        """Runs a command, unless it has been run.

        Args:
            command: Which one.
            options: Its own options.
        """
        file, this = self.folder / "done.json", [command, *self.words, *options]
        done = json.loads(file.read_text()) if file.is_file() else []
        if this in done:
            return
        start, threads = time.monotonic(), max(1, (os.cpu_count() or 1) // self.workers)
        log = self.folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            result = subprocess.run(
                [sys.executable, "-m", "lightning_drm", *this],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"{self.folder.name}: {command} failed; {log} says why.")
        write_text(file, json.dumps([*done, this]))
        print(f"{self.folder.name}: {command} took {time.monotonic() - start:.0f} s", flush=True)


def runs(folder: Path, finetuning: Mapping[str, Sequence[Path]], seeds: Sequence[int], workers: int) -> Iterator[Run]:
    for seed in seeds:
        for name, configs in finetuning.items():
            run = folder / f"{name}-{seed}"
            words = [word for config in configs for word in ("--config", str(config))]
            words += ["--seed_everything", str(seed), "--drm.dirpath", str(run)]
            yield Run(name, seed, run, words, workers)


def tuned_methods(run: Path, grids: Grids, num_samples: int) -> dict[str, Method]:
    """By a method's row in the tables, its best setting on the samples of validation that `tune` measured."""
    trials = pd.read_csv(run / "tune" / "trials.csv")
    trials = trials[(trials["validation samples per task"] == str(num_samples)) & (trials["state"] == "complete")]
    found = {}
    for name, grid in grids.items():
        nesting = Nesting(tuple(getattr(lightning_drm, word) for word in name.split(" of ")))
        of_method = trials[trials["method"] == " of ".join(f"lightning_drm.{word}" for word in name.split(" of "))]
        words = [parameter for parameter, values in grid.items() if isinstance(values[0], str)]
        for _, of_family in of_method.groupby(words) if words else [((), of_method)]:
            best = of_family.loc[of_family["normalized average"].idxmax()]
            method = nesting.made({parameter: type(values[0])(best[parameter]) for parameter, values in grid.items()})
            found[family(method)] = method
    return found


def family(method: Method) -> str:
    """The name of a method's row in the tables: each direction and space has its own, other settings do not."""
    direction, inside = (getattr(method, name, None) for name in ("direction", "method"))
    name = type(method).__name__ + (f"-{direction[0].upper()}" if direction else "")
    space = ", core space" if getattr(method, "space", None) == "core" else ""
    return name + space + (f" of {family(inside)}" if inside else "")


def as_option(methods: Sequence[Method]) -> str:
    """Methods as the command line takes them, each one once."""
    found = {
        method_title(method): {"class_path": class_path(method), "init_args": plain_arguments(method)}
        for method in methods
    }
    return json.dumps(list(found.values()))


def work_on(run: Run, grids: Grids, num_samples: int, analyses: Sequence[str]) -> None:
    run.do("fit")
    search = ["--grid", json.dumps(grids), "--num_samples", str(num_samples)]
    run.do("tune", *search, "--num_finalists", "1", "--prune", "false")  # what is given up has no score to choose by
    methods = [*METHODS, *tuned_methods(run.folder, grids, num_samples).values()]
    run.do("compare", "--split", "test", "--methods", as_option(methods))
    options = ["--analyses", json.dumps([ABLATION, TASKS]), "--num_samples", str(num_samples)]
    run.do("analyze", "--only", json.dumps(analyses), *options)


def studied(run: Run, grids: Grids, num_samples: int) -> Studied:
    methods = {
        "default": {family(method): method for method in METHODS},
        "tuned": tuned_methods(run.folder, grids, num_samples),
    }
    titles = {
        setting: {name: method_title(method) for name, method in found.items()} for setting, found in methods.items()
    }
    return Studied(run.finetuning, run.seed, run.folder, titles)


def study(
    folder: Path = Path("runs/study"),
    output: Path = HERE,
    seeds: Sequence[int] = (0, 1, 2),
    workers: int = 2,
    finetuning: Mapping[str, Sequence[Path]] = FINETUNING,
    grids: Grids = GRIDS,
    num_samples: int = TUNING_SAMPLES,
) -> None:
    """Runs what is missing of the study, and writes its tables, pictures and pages.

    Args:
        folder: Where the run folders are.
        output: Where the results are written.
        seeds: The seeds of finetuning.
        workers: How many runs share the cores.
        finetuning: By name of the kind of finetuning, its configuration files.
        grids: By method, what is tuned.
        num_samples: How many validation samples of each task measure a setting, and the models of analyses.
    """
    todo = list(runs(folder, finetuning, seeds, workers))
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(
                work_on, run, grids, num_samples, [*OF_ALL_SEEDS, *(OF_FIRST_SEED if run.seed == seeds[0] else [])]
            )
            for run in todo
        ]
        for job in jobs:
            job.result()
    write_results([studied(run, grids, num_samples) for run in todo], output)
    print(f"The results: {output}")


if __name__ == "__main__":
    auto_cli(study)
