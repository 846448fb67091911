"""From a recipe and task vectors to merged deltas, and the run folder that keeps both."""

from lightning_drm.engine.fuse import Fusion
from lightning_drm.engine.model_card import model_card
from lightning_drm.engine.output import read_merged, write_merged
from lightning_drm.engine.recipe import Recipe
from lightning_drm.engine.run_folder import RunFolder, write_json, write_text

__all__ = ["Fusion", "Recipe", "RunFolder", "model_card", "read_merged", "write_json", "write_merged", "write_text"]
