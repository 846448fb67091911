"""A recipe laid over task vectors: what happens to each parameter, who merges it, and the merged deltas."""

from lightning_drm.fusion.fuse import Fusion
from lightning_drm.fusion.model_card import model_card
from lightning_drm.fusion.recipe import Override, Recipe

__all__ = ["Fusion", "Override", "Recipe", "model_card"]
