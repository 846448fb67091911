"""The methods that came after the study, beside those that it has: on the same tasks, with what they cost.

    pip install -e '.[study]' && python examples/study/later.py

The finetunes are those of run.py, with statistics of their training data, in run folders of their own. Methods are
measured with their defaults and, where they have a λ or the like of their own, tuned on the samples of validation that
run.py tunes on. The coefficients of task arithmetic are learned, too, for each task and parameter. Stop the script and
start it again: it goes on where it was.
"""

import csv
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from report import OWN, Mean, mean
from run import (
    DENSITIES,
    FINETUNING,
    HERE,
    METHODS,
    SCALES,
    TUNING_SAMPLES,
    Grids,
    Run,
    as_option,
    family,
    runs,
    tuned_methods,
)

from lightning_drm import STAR, SVC, TIES, TSVM, WUDI, DCMerge, Fisher, KnOTS, LiNeS, RegMean, TaskArithmetic
from lightning_drm.deltas import load_task_vector
from lightning_drm.fusion import Fusion, Recipe, method_title
from lightning_drm.merging import DRM, Method
from lightning_drm.storage import write_text
from lightning_drm.tuning.objective import Objective

LATER: Mapping[str, Method] = {
    "WUDI": WUDI(),
    "WUDI, ridge 0": WUDI(ridge=0.0),
    "WUDI, with inputs": WUDI(input_weight=1.0),
    "RegMean": RegMean(),
    "RegMean++": RegMean(propagate=True),
    "Fisher": Fisher(),
    "DC-Merge": DCMerge(),
    "STAR": STAR(),
    "KnOTS": KnOTS(),
    "SVC of DRM-H": SVC(DRM()),
    "SVC of task arithmetic": SVC(TaskArithmetic()),
    "SVC of TSV-M": SVC(TSVM(), alpha=1.0),  # its authors' α after TSV-M
    "LiNeS of DRM-H": LiNeS(DRM()),
    "LiNeS of task arithmetic": LiNeS(TaskArithmetic(scale=1.0)),
    "TIES, core space": TIES(space="core"),
}
ROWS: Mapping[str, Method] = {
    **dict(zip(
        ["DRM-H", "DRM-V", "TIES", "DARE-TIES", "Task arithmetic", "Average", "Iso-C", "Iso-CTS", "TSV-M"],
        METHODS, strict=True,
    )),
    **LATER,
}  # fmt: skip
NAMES = {family(method): name for name, method in reversed([*ROWS.items()])}
"""Of all settings of a method, the row of its defaults, which come first."""

ALPHAS = [0.05, 0.125, 0.5, 1.0]
BETAS = [0.2, 0.4, 0.7, 1.0]
TUNED: Grids = {
    "DRM": {"direction": ["horizontal"], "density": DENSITIES, "scale": SCALES},
    "IsoC": {"scale": SCALES},
    "TSVM": {"scale": SCALES},
    "WUDI": {"ridge": [0.03, 0.1, 0.3], "input_weight": [0.0, 1.0], "scale": SCALES},
    "RegMean": {"alpha": [0.5, 0.8, 0.95, 1.0]},
    "DCMerge": {"scale": [0.4, 0.8, 1.2, 1.6, 2.0]},
    "STAR": {"eta": [20.0, 40.0, 60.0], "scale": SCALES},
    "KnOTS": {"density": DENSITIES, "scale": SCALES},
    "TIES": {"space": ["entries", "core"], "density": DENSITIES, "scale": SCALES},
    "SVC of DRM": {"alpha": ALPHAS, "method.direction": ["horizontal"], "method.density": DENSITIES},
    "SVC of TaskArithmetic": {"alpha": ALPHAS},
    "SVC of TSVM": {"alpha": ALPHAS},
    "LiNeS of DRM": {"beta": BETAS, "method.direction": ["horizontal"]},
    "LiNeS of TaskArithmetic": {"beta": BETAS, "method.scale": [1.0]},
}
"""The first three are the study's own, for comparison; core space is searched for LoRA alone."""


LEARNED: Mapping[Objective, str] = {
    "labels": "Task arithmetic, λ learned from labels",
    "entropy": "Task arithmetic, λ learned without labels",
}


def possible(finetuning: str, fisher_samples: int) -> dict[str, Method]:
    """The methods that merge what a kind of finetuning leaves, and the statistics that are collected."""
    return {
        name: method
        for name, method in ROWS.items()
        if (finetuning == "lora" or not method.only_low_rank) and (fisher_samples or method.needs != "fisher")
    }


def searched(finetuning: str, grids: Grids) -> Grids:
    """What is tuned of a kind of finetuning: full finetunes have no core space."""
    if finetuning == "lora":
        return grids
    return {
        name: {parameter: [value for value in values if value != "core"] for parameter, values in grid.items()}
        for name, grid in grids.items()
    }


def work_on(run: Run, grids: Grids, num_samples: int, fisher_samples: int, learned: Sequence[Objective]) -> None:
    """Finetunes with statistics, learns coefficients and tunes on validation, and compares on the test sets."""
    options = ["--drm.statistics", "[gram]", "--drm.snapshots", "[]"]
    run.do("fit", *options, "--base_batches", "0")
    if fisher_samples:
        fisher = ["--drm.statistics", "[fisher]", "--drm.statistics_samples", str(fisher_samples)]
        run.do("collect", *fisher, "--drm.snapshots", "[]")
    for objective in learned:
        search = ["--search", "gradient", "--methods", "TaskArithmetic", "--objective", objective]
        run.do("tune", *options, *search, "--learning_rate", "0.01", "--max_steps", "100")
        if not (file := _learned(run, objective)).is_file():  # what is tuned next takes its place in the report
            write_text(file, json.dumps(json.loads((run.folder / "report.json").read_text())["tuned"]))
    if grids:
        search = ["--grid", json.dumps(searched(run.finetuning, grids)), "--num_samples", str(num_samples)]
        run.do("tune", *options, *search, "--num_finalists", "1", "--prune", "false")
    methods = [*possible(run.finetuning, fisher_samples).values(), *_tuned(run, grids, num_samples).values()]
    run.do("compare", *options, "--split", "test", "--methods", as_option(methods))


def _tuned(run: Run, grids: Grids, num_samples: int) -> dict[str, Method]:
    """By a method's row in the tables, its best setting."""
    found = tuned_methods(run.folder, searched(run.finetuning, grids), num_samples) if grids else {}
    return {NAMES[name]: method for name, method in found.items()}


def _learned(run: Run, objective: Objective) -> Path:
    return run.folder / f"learned-{objective}.json"


def cost(folder: Path, name: str) -> tuple[float, float]:
    """Seconds and extra megabytes of one merge of a run's task vectors, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import later; later.merge_once({str(folder)!r}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The merge by {name} failed: {done.stderr}")
    words = done.stdout.split()
    return float(words[-2]), float(words[-1])


def merge_once(folder: str, name: str) -> None:
    """Merges, keeps nothing, and prints what it took. Memory is what the process has allocated, as Linux tells it."""
    vectors = [load_task_vector(path) for path in sorted((Path(folder) / "tasks").iterdir())]
    for _, _ in Fusion(Recipe(TaskArithmetic()), vectors):  # files are in the cache of the system, libraries are loaded
        pass
    done, before = threading.Event(), _allocated()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    for _, _ in Fusion(Recipe(ROWS[name]), vectors):
        pass
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(seconds, (peak[0] - before) / 1024)


def _allocated() -> int:
    """Kilobytes, without those of mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def write_table(
    todo: Sequence[Run],
    output: Path,
    grids: Grids,
    num_samples: int,
    fisher_samples: int,
    learned: Sequence[Objective],
    *,
    costs: bool,
) -> None:
    """Writes later_methods.csv and .md: the share of the finetunes' test scores, and the cost of a merge if asked."""
    output.mkdir(parents=True, exist_ok=True)
    lines, table = ["# The methods that came later", ""], []
    for finetuning in dict.fromkeys(run.finetuning for run in todo):
        own = [run for run in todo if run.finetuning == finetuning]
        settings: dict[str, list[dict[str, float]]] = {
            "default": [_shares(run, possible(finetuning, fisher_samples)) for run in own],
            "tuned": [_shares(run, _tuned(run, grids, num_samples), learned) for run in own] if grids else [],
        }
        for setting, shares in settings.items():
            if not shares:
                continue
            rows = [[finetuning, setting, *row] for row in _rows(shares)]
            if setting == "default":
                rows = [[*row, *_cost(own[0], row[2], costs)] for row in rows]
            lines += [f"## {finetuning}, {setting}", "", *_as_table(rows, costs and setting == "default"), ""]
            table += rows
    write_text(output / "later_methods.md", "\n".join(lines))
    with (output / "later_methods.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["finetuning", "setting", "method", "share", "share ±", "gap", "gap ±", "seconds", "extra MB"])
        writer.writerows(table)


def _shares(run: Run, methods: Mapping[str, Method], learned: Sequence[Objective] = ()) -> dict[str, float]:
    """By row, the share of the finetunes' test scores that a run's merge keeps."""
    compared = json.loads((run.folder / "report.json").read_text())["methods"]
    found = {name: compared[method_title(method)] for name, method in methods.items()}
    found |= {LEARNED[objective]: json.loads(_learned(run, objective).read_text()) for objective in learned}
    return {name: one["normalized"]["average"] for name, one in found.items()}


def _rows(shares: Sequence[Mapping[str, float]]) -> list[list[Any]]:
    """By method, best first: its share of the finetunes' scores, and the points to DRM-H, each with its interval.

    Args:
        shares: Of each run, by row, the share.
    """
    table = {name: [of_run[name] for of_run in shares] for name in shares[0]}
    rows = []
    for name in sorted(table, key=lambda name: -sum(table[name])):
        share = mean(table[name])
        gap = mean([a - b for a, b in zip(table[name], table[OWN], strict=True)])
        rows.append([name, share.value, share.half, gap.value, gap.half])
    return rows


def _as_table(rows: Sequence[Sequence[Any]], has_costs: bool) -> list[str]:
    titles = ["method", "% of the finetunes' scores", "points to DRM-H", *(["seconds", "extra MB"] * has_costs)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for _, _, name, share, half, gap, gap_half, *cost in rows:
        cells = [name, Mean(share, half).shown(), "" if name == OWN else Mean(gap, gap_half).shown(signed=True)]
        if has_costs:
            cells += ["" if math.isnan(cost[0]) else f"{cost[0]:.1f}", "" if math.isnan(cost[1]) else f"{cost[1]:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cost(run: Run, name: str, measured: bool) -> tuple[float, float]:
    if not measured or ROWS[name].propagate:  # most of whose work is passes of the data
        return math.nan, math.nan
    return cost(run.folder, name)


def later(
    folder: Path = Path("runs/later"),
    output: Path = HERE,
    seeds: Sequence[int] = (0, 1, 2),
    workers: int = 2,
    finetuning: Mapping[str, Sequence[Path]] = FINETUNING,
    grids: Grids = TUNED,
    num_samples: int = TUNING_SAMPLES,
    fisher_samples: int = 64,
    learned: Sequence[Objective] = ("labels", "entropy"),
    costs: bool = True,
) -> None:
    """Runs what is missing, and writes the table.

    Args:
        folder: Where the run folders are.
        output: Where the table is written.
        seeds: The seeds of finetuning.
        workers: How many runs share the cores.
        finetuning: By name of the kind of finetuning, its configuration files.
        grids: By method, what is tuned; nothing is if it is empty.
        num_samples: How many validation samples of each task measure a setting.
        fisher_samples: How many training samples of each task give Fisher information, each of which takes a backward
            pass for each class; 0 leaves Fisher out.
        learned: By what the coefficients of task arithmetic are learned; rows among those that are tuned.
        costs: Whether the time and memory of a merge by each method are measured.
    """
    todo = [run for name in finetuning for run in runs(folder, {name: finetuning[name]}, seeds, workers)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda run: work_on(run, grids, num_samples, fisher_samples, learned), todo))
    write_table(todo, output, grids, num_samples, fisher_samples, learned, costs=costs)
    print(f"The table: {output}/later_methods.md")


if __name__ == "__main__":
    auto_cli(later)
