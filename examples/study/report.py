"""The study's tables and pictures: means over seeds, and differences to DRM with their intervals.

The interval of a mean over n seeds is Student's: mean ± t(0.975, n - 1) · s / √n. With three seeds, t is 4.3, so that
a difference has to be much the same in all of them before it counts.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy.stats import t

from lightning_drm.evaluation.figures import line, new_figure, percent, style_of, write_svg

OWN = "DRM-H"


@dataclass(frozen=True)
class Studied:
    """A run whose commands are done.

    Attributes:
        finetuning: ``full`` or ``lora``.
        seed: The seed of finetuning.
        folder: The run folder.
        titles: By setting, ``default`` or ``tuned``, and by method, the setting's title in the run's comparison.
    """

    finetuning: str
    seed: int
    folder: Path
    titles: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, in percent or points.

    Attributes:
        value: The mean.
        half: Half of its 95 % interval; not a number with one seed.
    """

    value: float
    half: float

    @property
    def side(self) -> int:
        """1 if it is above 0 by more than the noise of seeds, -1 if it is below, and 0 if it may be either."""
        return 0 if math.isnan(self.half) or abs(self.value) <= self.half else int(math.copysign(1, self.value))

    def shown(self, *, signed: bool = False) -> str:
        number = f"{self.value:+.1f}" if signed else f"{self.value:.1f}"
        return number if math.isnan(self.half) else f"{number} ±{self.half:.1f}"


def mean(fractions: Sequence[float]) -> Mean:
    values = 100 * pd.Series(fractions)
    half = t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(values.mean(), half)


def write_results(runs: Sequence[Studied], output: Path) -> None:
    """Writes ``results.md``, the pictures and tables behind it, and the page of each first run.

    Args:
        runs: The runs.
        output: The folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    scores = pd.DataFrame([row for run in runs for row in _rows(run)])
    scores.to_csv(output / "methods.csv", index=False)
    parts = [
        "# Results",
        "Written by `run.py`; ±: half of the 95 % interval over seeds. README.md says what they mean.",
    ]
    kinds = list(dict.fromkeys(run.finetuning for run in runs))
    for kind in kinds:
        first = next(run for run in runs if run.finetuning == kind)
        shutil.copy(first.folder / "report.html", output / f"{kind}.html")
        parts += [f"## {_name(kind)}", _reference(runs, kind), *_methods(scores[scores["finetuning"] == kind])]
        parts += [f"The page of seed {first.seed}, with all figures: [{kind}.html]({kind}.html)."]
    _draw_methods(scores, kinds, output / "methods.svg")
    parts += ["## Methods", "![methods](methods.svg)"]
    ablation, trajectory = (_analysis(runs, name) for name in ("ablation", "trajectory"))
    ablation.to_csv(output / "ablation.csv", index=False)
    trajectory.to_csv(output / "trajectory.csv", index=False)
    parts += ["## Ablation", *_ablation(ablation, kinds)]
    _draw_trajectory(trajectory, kinds, output / "trajectory.svg")
    parts += ["## Steps of finetuning", "![trajectory](trajectory.svg)"]
    (output / "results.md").write_text("\n\n".join(parts) + "\n")


def _name(kind: str) -> str:
    return {"full": "Full finetuning", "lora": "LoRA"}.get(kind, kind)


def _rows(run: Studied) -> Iterator[dict[str, object]]:
    compared = json.loads((run.folder / "report.json").read_text())["methods"]
    for setting, titles in run.titles.items():
        for method, title in titles.items():
            found = compared[title]
            yield {
                "finetuning": run.finetuning,
                "seed": run.seed,
                "method": method,
                "setting": setting,
                "title": title,
                "normalized average (fraction)": found["normalized"]["average"],
                **{f"test {task} (fraction)": score for task, score in found["scores"].items()},
            }


NORMALIZED, SCORE = "normalized average (fraction)", "test average (fraction)"


def _reference(runs: Sequence[Studied], kind: str) -> str:
    """What the merges are compared with."""
    reports = [json.loads((run.folder / "report.json").read_text()) for run in runs if run.finetuning == kind]
    base, individual = (
        mean([report["scores"][row]["average"] for report in reports]).shown() for row in ("base", "individual")
    )
    what = f"{len(reports[0]['tasks'])} tasks, seeds: {len(reports)}"
    return f"{what}. Average test score: base {base} %, individual finetunes {individual} %."


def _methods(scores: pd.DataFrame) -> list[str]:
    """A table of a kind's methods, the best tuned one first, and a sentence for each setting."""
    own = {setting: _by_seed(scores, OWN, setting)[NORMALIZED] for setting in ("default", "tuned")}
    rows, verdicts = {}, {"default": {}, "tuned": {}}
    for method in dict.fromkeys(scores["method"]):
        cells = []
        for setting in ("default", "tuned"):
            found = _by_seed(scores, method, setting)
            if found.empty:  # it has nothing to tune
                cells += ["", "", ""]
                continue
            difference = mean(found[NORMALIZED] - own[setting])
            verdicts[setting][method] = mean(found[NORMALIZED]), difference
            shown = "" if method == OWN else difference.shown(signed=True)
            cells += [mean(found[SCORE]).shown(), mean(found[NORMALIZED]).shown(), shown]
        best = verdicts["tuned"].get(method) or verdicts["default"][method]
        rows[f"| {method} | {' | '.join(cells)} |"] = best[0].value
    columns = ["score (%)", "normalized (%)", f"to {OWN}"]
    header = ["method", *(f"{setting}: {column}" for setting in ("default", "tuned") for column in columns)]
    table = [f"| {' | '.join(header)} |", "|---|" + 6 * "--:|", *sorted(rows, key=lambda row: -rows[row])]
    return ["\n".join(table), *(_verdict(setting, found) for setting, found in verdicts.items())]


def _by_seed(scores: pd.DataFrame, method: str, setting: str) -> pd.DataFrame:
    return scores[(scores["method"] == method) & (scores["setting"] == setting)].set_index("seed")


def _verdict(setting: str, found: Mapping[str, tuple[Mean, Mean]]) -> str:
    """Who leads, and which methods the seeds do not tell from DRM."""
    best = max(found, key=lambda method: found[method][0].value)
    words = {1: "ahead", 0: "inside the noise", -1: "behind"}
    sides = [
        f"{text}: {', '.join(names)}"
        for side, text in words.items()
        if (names := [method for method, (_, difference) in found.items() if difference.side == side and method != OWN])
    ]
    of = {"default": "With their defaults", "tuned": "Tuned on validation"}[setting]
    lead = f"{of}, {best} is best: {found[best][0].shown()} % of the finetunes' scores."
    own = "" if best == OWN else f" {OWN}: {found[OWN][0].shown()} %."
    return f"{lead}{own} Beside {OWN}, {'; '.join(sides)}."


def _analysis(runs: Sequence[Studied], name: str) -> pd.DataFrame:
    """An analysis's table of all runs."""
    tables = []
    for run in runs:
        table = pd.read_csv(run.folder / "analysis" / f"{name}.csv")
        table.insert(0, "finetuning", run.finetuning)
        table.insert(1, "seed", run.seed)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _ablation(table: pd.DataFrame, kinds: Sequence[str]) -> list[str]:
    """Each step's change of the average, by kind of finetuning."""
    averages = table[table["task"] == "average"].copy()
    drop = averages["rank drop (fraction)"].map(lambda share: f", rank drop {share:g}" if share else "")
    averages["merge"] = averages["variation"] + drop
    rows = [f"| merge | {' | '.join(_name(kind) for kind in kinds)} |", "|---|" + len(kinds) * "--:|"]
    for merge in dict.fromkeys(averages["merge"]):
        of_merge = averages[averages["merge"] == merge]
        changes = [of_merge.loc[of_merge["finetuning"] == kind, "change of the average"] for kind in kinds]
        rows.append(f"| {merge} | {' | '.join(mean(change.tolist()).shown(signed=True) for change in changes)} |")
    return [f"Change of the average score ({OWN}, density 0.2), in points, on samples of validation.", "\n".join(rows)]


def _draw_methods(scores: pd.DataFrame, kinds: Sequence[str], path: Path) -> None:
    """Each method's normalized average: the mean over seeds and every seed, untuned and tuned."""
    methods = list(dict.fromkeys(scores["method"]))
    figure, plots = new_figure(1.8 + 4.0 * len(kinds), 1.6 + 0.42 * len(methods), columns=len(kinds))
    for plot, kind in zip(plots, kinds, strict=True):
        for index, setting in enumerate(("default", "tuned")):
            style = style_of(index)
            for height, method in enumerate(methods):
                values = 100 * scores[scores["finetuning"] == kind].pipe(_by_seed, method, setting)[NORMALIZED]
                if values.empty:
                    continue
                place = height + 0.3 * (index - 0.5)
                plot.scatter(values, [place] * len(values), s=10, alpha=0.5, **style)
                label = setting if height == 0 else None
                plot.scatter(values.mean(), place, s=60, label=label, **style)
                text = f"{values.mean():.1f}"
                plot.annotate(text, (values.max(), place), (8, 0), textcoords="offset points", va="center", fontsize=7)
        plot.set_yticks(range(len(methods)), methods if plot is plots[0] else [], fontsize=8)
        plot.invert_yaxis()
        plot.grid(axis="y", color="0.9")
        plot.set_title(_name(kind), fontsize=9)
        plot.set_xlabel("normalized average on test (%); small: seeds")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    write_svg(figure, path)


def _draw_trajectory(table: pd.DataFrame, kinds: Sequence[str], path: Path) -> None:
    """Average validation score of the finetunes and of their merge over steps: mean, and range of seeds."""
    averages = table[table["task"] == "average"]
    figure, plots = new_figure(4.6 * len(kinds), 3.8, columns=len(kinds))
    for plot, kind in zip(plots, kinds, strict=True):
        for index, model in enumerate(("individual", "merged")):
            of_model = averages[(averages["finetuning"] == kind) & (averages["model"] == model)]
            by_step = of_model.groupby("steps")["score"].agg(["mean", "min", "max"])
            points = [(row["mean"], (row["min"], row["max"])) for _, row in by_step.iterrows()]
            line(plot, index, list(by_step.index), points, model)
        plot.set_title(f"{_name(kind)}, merged with {OWN}, density 0.2", fontsize=9)
        plot.set_xlabel("finetuning steps (band: range of seeds)")
        percent(plot, "average validation score")
        plot.legend(fontsize=8, frameon=False)
    write_svg(figure, path)
