r"""What each step of DRM contributes: merges without it, one at a time.

The studies of Tables 3, 7 and 8 and Figure 6 of arXiv 2505.23117, on the tasks at hand:

1. Merge with DRM as it is configured, horizontally and vertically.
2. Switch off one step after another: renormalization, pruning (density 1), sign election, the disjoint average; prune
   each task by itself instead of all of them jointly. A step that the configuration has switched off is switched on.
3. Drop the weakest share k of the joint basis' directions before renormalization, for k from 0 to 0.95.
4. Measure every merged model on the same samples, and its change against the one of step 1: the interval of the change
   is paired, so that hard samples count for both.

The merges of steps 1 and 2 share a decomposition in each direction. Nearly all of the cost are evaluations of all
tasks: six in each direction for these steps, and one for each further k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pandas as pd
from matplotlib.figure import Figure
from typing_extensions import override

from lightning_drm.analysis.analysis import Analysis, OnStep
from lightning_drm.analysis.matrices import drm_of
from lightning_drm.analysis.summary import AVERAGE, Summary, comparison, points, rows, summary
from lightning_drm.evaluation import Candidates, Comparison, Finding, paired_interval
from lightning_drm.evaluation.figures import Point, bars, line, new_figure, percent
from lightning_drm.evaluation.published import SOURCE
from lightning_drm.fusion import Recipe, method_title
from lightning_drm.merging import DRM
from lightning_drm.merging.joint_basis import Direction

FULL = "all steps"

FLAT = 0.01
"""Up to which change of a score the rank drop is called without effect."""

Key = tuple[str, Direction, float]
"""Variation, direction and rank drop."""

Found = Mapping[Key, Summary]

_SWITCHES = {
    "renormalize": ("no renormalization", "renormalization"),
    "elect_sign": ("no sign election", "sign election"),
    "disjoint": ("no disjoint average", "disjoint average"),
}


@dataclass(frozen=True)
class Variation:
    """A merge of the study.

    Attributes:
        name: Which step differs.
        method: How it merges.
    """

    name: str
    method: DRM

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this method; where nothing is pruned, exceptions for single parameters do not prune either.

        Args:
            recipe: The recipe.
        """
        overrides = recipe.overrides
        if self.name == "no pruning":
            overrides = [replace(o, density=1.0) if o.density is not None else o for o in overrides]
        return replace(recipe, method=self.method, overrides=overrides)


class Ablation(Analysis):
    """Merged scores with each step of DRM switched off, and with directions of the joint basis dropped.

    Args:
        directions: In which directions.
        rank_drops: Which shares of the directions are dropped; 0, where none is, comes anyway.

    Raises:
        ValueError: If there is no direction, or a share is out of range.
    """

    name = "ablation"
    needs_scores = True

    def __init__(
        self,
        directions: Sequence[Direction] = ("horizontal", "vertical"),
        rank_drops: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    ) -> None:
        allowed = get_args(Direction)
        if not directions or not set(directions) <= set(allowed):
            raise ValueError(f"ablation: directions must be some of {', '.join(allowed)}, got {list(directions)}.")
        if wrong := [share for share in rank_drops if not 0 <= share < 1]:
            raise ValueError(f"ablation: rank_drops must be at least 0 and below 1, got {wrong[0]}.")
        self.directions = list(dict.fromkeys(directions))
        self.rank_drops = sorted({*rank_drops} - {0.0})

    @override
    def run(self, candidates: Candidates, on_step: OnStep) -> list[Finding]:
        method = drm_of(candidates.recipe)
        variations = [v for direction in self.directions for v in self._variations(method, direction)]
        found: dict[tuple[str, Direction, float], Summary] = {}
        changes: dict[tuple[str, Direction, float], Point] = {}
        whole: Comparison | None = None
        table: list[dict[str, object]] = []
        for number, variation in enumerate(variations, 1):
            setting = variation.method
            alone = candidates.vectors if setting.rank_drop != method.rank_drop else None  # nothing to keep for others
            merged = candidates.merged(variation.of(candidates.recipe), alone)
            compared = comparison(candidates, candidates.scores(merged))
            key = variation.name, setting.direction, setting.rank_drop
            found[key] = summary(compared)
            if variation.name == FULL and setting.rank_drop == method.rank_drop:
                whole = compared
            assert whole is not None, "a direction begins with all steps"
            changes[key] = change = _change(compared, whole)
            labels = {
                "variation": variation.name,
                "direction": setting.direction,
                "density (fraction)": setting.density,
                "rank drop (fraction)": setting.rank_drop,
            }
            low, high = change[1] or (None, None)
            names = "", ", 95 % from", ", 95 % to"
            against = {f"change of the average{n}": v for n, v in zip(names, (change[0], low, high), strict=True)}
            table += [{**row, **against} if row["task"] == AVERAGE else row for row in rows(compared, labels)]
            on_step(number, len(variations))
        published = _published(candidates, method)
        for row in table if published else []:
            is_switch = row["direction"] == "horizontal" and row["rank drop (fraction)"] == method.rank_drop
            row["change of the average, published"] = (
                published.get(str(row["variation"])) if is_switch and row["task"] == AVERAGE else None
            )
        title = f"Ablation of {len(candidates.tasks)} tasks' merge ({method_title(method)})"
        sentence = _sentence(found, changes, method)
        if method is not candidates.recipe.method:
            configured = method_title(candidates.recipe.method)
            sentence += f" The configured method is {configured}, so this is DRM with its defaults."
        if published:
            listed = ", ".join(f"{name} {points(change)}" for name, change in published.items())
            sentence += f" Published of DRM, horizontal ({SOURCE}): {listed}."
        return [Finding(self.name, title, sentence, pd.DataFrame(table), _figure(found, changes, method, title))]

    def _variations(self, method: DRM, direction: Direction) -> list[Variation]:
        full = _with(method, "direction", direction)
        switched = [
            Variation(off if getattr(full, name) else f"with {on}", _with(full, name, not getattr(full, name)))
            for name, (off, on) in _SWITCHES.items()
        ]
        if full.density < 1:
            other = "individual" if full.prune == "joint" else "joint"
            switched.append(Variation("no pruning", _with(full, "density", 1.0)))
            switched.append(Variation(f"{other} pruning", _with(full, "prune", other)))
        dropped = [k for k in (0.0, *self.rank_drops) if k != full.rank_drop]
        return [Variation(FULL, full), *switched, *(Variation(FULL, _with(full, "rank_drop", k)) for k in dropped)]


def _published(candidates: Candidates, method: DRM) -> Mapping[str, float]:
    """By variation, the published change of the average accuracy; empty where it is of something else."""
    if candidates.published is None or any(score.metric.name != "accuracy" for score in candidates.individual.values()):
        return {}
    recipe = replace(candidates.recipe, method=_with(method, "direction", "horizontal"))
    return candidates.published.changes(recipe, candidates.tasks)


def _with(method: DRM, name: str, value: object) -> DRM:
    arguments: dict[str, Any] = {**method.hyperparameters(), name: value}
    return type(method)(**arguments)


def _change(compared: Comparison, whole: Comparison) -> Point:
    """How much better a model is than the whole method's, and the paired interval of that."""
    value = summary(compared).value - summary(whole).value
    pairs = [(compared.merged[task], whole.merged[task]) for task in whole.averaged]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    return value, paired_interval([one for one, _ in known], [other for _, other in known])


def _sentence(found: Found, changes: Mapping[Key, Point], method: DRM) -> str:
    """Of each direction: the whole, what each step is worth, and how far directions can be dropped."""
    parts = []
    for direction in dict.fromkeys(direction for _, direction, _ in found):
        whole = found[FULL, direction, method.rank_drop]
        switched = {name: change for (name, other, _), change in changes.items() if other == direction and name != FULL}
        listed = ", ".join(
            f"{name} {points(*switched[name])}" for name in sorted(switched, key=lambda name: switched[name][0])
        )
        parts.append(
            f"DRM, {direction}, with {FULL}: {whole.what} {whole}; {listed}{_dropped(found, direction, whole)}."
        )
    return " ".join(parts)


def _dropped(found: Found, direction: Direction, whole: Summary) -> str:
    changes = {k: value.value - whole.value for k, value in _curve(found, direction).items()}
    if len(changes) == 1:
        return ""
    flat = [k for k in changes if all(abs(changes[below]) <= FLAT for below in changes if below <= k)]
    within = f"by at most {100 * FLAT:g} point up to a share of {flat[-1]:g}, and " if flat else ""
    return f"; dropping directions changes it {within}by {points(changes[max(changes)])} at {max(changes):g}"


def _curve(found: Found, direction: Direction) -> dict[float, Summary]:
    """The models with all steps, by rank drop in order."""
    return {k: found[name, other, k] for name, other, k in sorted(found) if (name, other) == (FULL, direction)}


def _figure(found: Found, changes: Mapping[Key, Point], method: DRM, title: str) -> Figure:
    directions = list(dict.fromkeys(direction for _, direction, _ in found))
    what = next(iter(found.values())).what
    switches = list(dict.fromkeys(name for name, _, k in found if k == method.rank_drop and name != FULL))
    figure, (left, right) = new_figure(10.0, 1.4 + 0.22 * len(directions) * len(switches), columns=2)
    figure.suptitle(title, fontsize=9)
    series: dict[str, Sequence[Point]] = {
        direction: [changes[name, direction, method.rank_drop] for name in switches] for direction in directions
    }
    bars(left, switches, series, f"change of the {what}", signed=True)
    for number, direction in enumerate(directions):
        curve = _curve(found, direction)
        line(right, number, list(curve), [value.point for value in curve.values()], direction)
    right.set_xlabel("share of the joint basis' directions that is dropped")
    percent(right, what)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
