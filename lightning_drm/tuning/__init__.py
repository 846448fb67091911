"""Which recipe merges best: methods side by side, and searches for the best setting."""

from lightning_drm.tuning.compare import chosen_recipes, compare
from lightning_drm.tuning.compared import ComparedMethods
from lightning_drm.tuning.compared_figure import compared_finding
from lightning_drm.tuning.compared_table import compared_table, result_line
from lightning_drm.tuning.pictures import family_finding
from lightning_drm.tuning.progress import tuning_bar
from lightning_drm.tuning.settings import SearchSettings
from lightning_drm.tuning.space import Family, search_space, setting_title
from lightning_drm.tuning.trial import table_of
from lightning_drm.tuning.tune import Tuned, tune
from lightning_drm.tuning.tuned_table import tuned_section, tuned_sentence, tuned_table

__all__ = [
    "ComparedMethods",
    "Family",
    "SearchSettings",
    "Tuned",
    "chosen_recipes",
    "compare",
    "compared_finding",
    "compared_table",
    "family_finding",
    "result_line",
    "search_space",
    "setting_title",
    "table_of",
    "tune",
    "tuned_section",
    "tuned_sentence",
    "tuned_table",
    "tuning_bar",
]
