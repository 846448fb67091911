"""Which recipe merges best: methods side by side."""

from lightning_drm.tuning.compare import chosen_recipes, compare
from lightning_drm.tuning.compared import ComparedMethods
from lightning_drm.tuning.compared_figure import compared_finding
from lightning_drm.tuning.compared_table import compared_table, result_line

__all__ = ["ComparedMethods", "chosen_recipes", "compare", "compared_finding", "compared_table", "result_line"]
