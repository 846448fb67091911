"""A recipe laid over task vectors.

`Recipe` says what happens to each kind of parameter, and `Fusion` does it, one parameter of all tasks at a time.
`share_out` decides which rank merges which parameter, and `model_card` writes down what was done.
"""

from lightning_drm.fusion.decompositions import Decompositions
from lightning_drm.fusion.described import facts_on_kinds, method_title
from lightning_drm.fusion.device_memory import bytes_beside_training, free_bytes
from lightning_drm.fusion.footprint import merging_bytes, too_large_as_a_whole
from lightning_drm.fusion.fuse import Fusion, Merged, merge_side_by_side
from lightning_drm.fusion.known import problem_of_statistics, treatments
from lightning_drm.fusion.model_card import model_card
from lightning_drm.fusion.recipe import Override, Recipe, Treatment

__all__ = [
    "Decompositions",
    "Fusion",
    "Merged",
    "Override",
    "Recipe",
    "Treatment",
    "bytes_beside_training",
    "facts_on_kinds",
    "free_bytes",
    "merge_side_by_side",
    "merging_bytes",
    "method_title",
    "model_card",
    "problem_of_statistics",
    "too_large_as_a_whole",
    "treatments",
]
