"""Which recipe merges best: methods side by side, and searches for the best setting."""

from lightning_drm.tuning.compare import chosen_recipes, compare
from lightning_drm.tuning.compared import ComparedMethods
from lightning_drm.tuning.compared_figure import compared_finding
from lightning_drm.tuning.compared_table import compared_table, result_line
from lightning_drm.tuning.judge import Judge
from lightning_drm.tuning.learned import Learned
from lightning_drm.tuning.learning import MONITOR, CoefficientFit
from lightning_drm.tuning.objective import Objective, loss_of, problem_of
from lightning_drm.tuning.options import SearchOptions
from lightning_drm.tuning.outcome import Outcome
from lightning_drm.tuning.parts import Parts, configured_coefficients, recipe_with, recipes_of_parts, stacked
from lightning_drm.tuning.progress import tuning_bar
from lightning_drm.tuning.settings import GradientSettings, SearchSettings
from lightning_drm.tuning.space import Family, learned_setting, search_space, setting_title
from lightning_drm.tuning.trial import Trial, table_of
from lightning_drm.tuning.tune import Tuned, tune
from lightning_drm.tuning.tuned_table import searched, tuned_section, tuned_table

__all__ = [
    "MONITOR",
    "CoefficientFit",
    "ComparedMethods",
    "Family",
    "GradientSettings",
    "Judge",
    "Learned",
    "Objective",
    "Outcome",
    "Parts",
    "SearchOptions",
    "SearchSettings",
    "Trial",
    "Tuned",
    "chosen_recipes",
    "compare",
    "compared_finding",
    "compared_table",
    "configured_coefficients",
    "learned_setting",
    "loss_of",
    "problem_of",
    "recipe_with",
    "recipes_of_parts",
    "result_line",
    "search_space",
    "searched",
    "setting_title",
    "stacked",
    "table_of",
    "tune",
    "tuned_section",
    "tuned_table",
    "tuning_bar",
]
