"""From a recipe and task vectors to merged deltas, and the run folder that keeps both."""

from lightning_drm.engine.fuse import Fusion
from lightning_drm.engine.merge_files import MergeResult, merge_files, output_problems
from lightning_drm.engine.model_card import model_card
from lightning_drm.engine.output import read_merged, write_merged
from lightning_drm.engine.plan import (
    Plan,
    Rules,
    make_plan,
    memory_bytes,
    plan_costs,
    read_bytes,
    refuse,
    table,
    written_bytes,
)
from lightning_drm.engine.recipe import Override, Recipe
from lightning_drm.engine.run_folder import RunFolder, write_json, write_text
from lightning_drm.engine.together import Owners, merge_together
from lightning_drm.engine.waiting import Store, WaitingRoom

__all__ = [
    "Fusion",
    "MergeResult",
    "Override",
    "Owners",
    "Plan",
    "Recipe",
    "Rules",
    "RunFolder",
    "Store",
    "WaitingRoom",
    "make_plan",
    "memory_bytes",
    "merge_files",
    "merge_together",
    "model_card",
    "output_problems",
    "plan_costs",
    "read_bytes",
    "read_merged",
    "refuse",
    "table",
    "write_json",
    "write_merged",
    "write_text",
    "written_bytes",
]
