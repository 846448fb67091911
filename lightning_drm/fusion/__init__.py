"""A recipe laid over task vectors.

`Recipe` says what happens to each kind of parameter, and `Fusion` does it, one parameter of all tasks at a time.
`share_out` decides which rank merges which parameter, and `model_card` writes down what was done.
"""

from lightning_drm.fusion.described import facts_on_kinds
from lightning_drm.fusion.fuse import Fusion, Merged
from lightning_drm.fusion.model_card import model_card
from lightning_drm.fusion.recipe import Override, Recipe, Treatment

__all__ = ["Fusion", "Merged", "Override", "Recipe", "Treatment", "facts_on_kinds", "model_card"]
