"""What a search found, as pictures: density (or the like) against λ as in the paper's Figure 7, or single numbers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_drm.evaluation import Finding
from lightning_drm.evaluation.figures import COLORS, heat_map, new_figure, percent
from lightning_drm.tuning.space import Family, setting_title
from lightning_drm.tuning.trial import Trial, table_of

_SCORE = "normalized validation score"


def family_finding(family: Family, trials: Sequence[Trial], tasks: Sequence[str]) -> Finding:
    """The settings of one family, and which was the best on the sample.

    Args:
        family: The family.
        trials: Its trials on the sample, at least one of which was finished.
        tasks: The tasks.
    """
    finished = [trial for trial in trials if trial.average is not None]
    best = max(finished, key=lambda trial: trial.reached)
    size = "all" if best.num_samples is None else f"at most {best.num_samples}"
    pruned = len(trials) - len(finished)
    sentence = (
        f"The best of {len(trials)} settings is {setting_title(best.recipe)}: {100 * best.reached:.1f} % of "
        f"the finetunes' own scores, averaged over {len(tasks)} tasks, on {size} validation samples of each."
    )
    if pruned:
        sentence += f" {pruned} could no longer be among the best after some of the tasks, and were given up."
    name = "".join(letter if letter.isalnum() else "-" for letter in family.title.replace(", ", "-").replace(".", "_"))
    figure = _picture(family, trials)
    return Finding(name, f"Search ({family.title})", sentence, table_of(trials, tasks), figure)


def _picture(family: Family, trials: Sequence[Trial]) -> Figure:
    finished = [trial for trial in trials if trial.average is not None]
    values = [tuple(trial.params[name] for name in family.numbers) for trial in finished]
    is_grid = all(value in family.numbers[n] for row in values for n, value in zip(family.numbers, row, strict=True))
    several = [name for name, choices in family.numbers.items() if len(choices) > 1]
    if is_grid and len(several) > 1 and several[-1] == "scale":
        return _heat_map(family, trials, several[0])
    searched = several or list(family.numbers)[:1]
    figure, panels = new_figure(width=max(6.4, 3.2 * len(searched)), columns=max(1, len(searched)))
    for panel, name in zip(panels, searched, strict=False):
        panel.scatter([t.params[name] for t in finished], [t.reached for t in finished], color=COLORS[0], s=18)
        panel.set_xlabel(_label(name))
        percent(panel, _SCORE)
    if not searched:
        panels[0].scatter([0], [finished[0].reached], color=COLORS[0])
        panels[0].set_xticks([0], [family.title])
        percent(panels[0], _SCORE)
    figure.suptitle(family.title)
    return figure


def _heat_map(family: Family, trials: Sequence[Trial], name: str) -> Figure:
    """One number down, λ across; of settings that differ in something else, the best one, or else the highest bound."""
    numbers, scales = sorted(family.numbers[name]), sorted(family.numbers["scale"])
    cells = np.full((len(numbers), len(scales)), np.nan)
    bounds = cells.copy()
    for trial in trials:
        row, column = numbers.index(trial.params[name]), scales.index(trial.params["scale"])
        table, value = (bounds, trial.bound) if trial.average is None else (cells, trial.reached)
        if np.isfinite(value):
            table[row, column] = np.nanmax([table[row, column], 100 * value])
    figure, (axes,) = new_figure(width=1.2 + 0.65 * max(8, len(scales)), height=1.4 + 0.32 * max(6, len(numbers)))
    heat_map(axes, cells.tolist(), [f"{value:g}" for value in numbers], [f"{value:g}" for value in scales])
    axes.set_xlabel(_label("scale"))
    axes.set_ylabel(_label(name))
    given_up = np.argwhere(np.isnan(cells) & ~np.isnan(bounds))
    for row, column in given_up:
        axes.text(column, row, f"≤ {bounds[row, column]:.1f}", ha="center", va="center", fontsize=6, color="0.45")
    note = "; ≤: given up early, at most so high" if len(given_up) else ""
    axes.set_title(f"{family.title}: {_SCORE} (%){note}", fontsize=9)
    return figure


def _label(name: str) -> str:
    if name == "scale":
        return "λ (scale)"
    return name.replace("coefficients.", "coefficient of ").replace("_", " ")
