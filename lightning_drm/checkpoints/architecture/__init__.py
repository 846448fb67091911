"""What is known of a model without its weights: its parameters' kinds, names and vocabulary."""

from lightning_drm.checkpoints.architecture.alignment import Alignment
from lightning_drm.checkpoints.architecture.experts import ExpertPart
from lightning_drm.checkpoints.architecture.facts import Architecture
from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy, row_map, token_rows

__all__ = ["Alignment", "Architecture", "ExpertPart", "VocabularyPolicy", "row_map", "token_rows"]
