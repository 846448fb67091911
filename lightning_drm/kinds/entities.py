"""Entities in tagged sentences, and how many of them a model finds: the measure of CoNLL's shared tasks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_drm.kinds.kind import IGNORE_INDEX

_SINGLE, _LAST = "SU", "EL"  # BILOU writes U and L for what IOBES calls S and E
_PREFIXES = f"BI{_SINGLE}{_LAST}"
_OUTSIDE = "O"

Entity = tuple[str, int, int]
"""What an entity is, its first and its last place."""


def are_entity_tags(tags: Sequence[str]) -> bool:
    """Whether tags say where entities begin and end: ``O``, and a letter, a dash and what the entity is.

    Args:
        tags: The names of the tags.

    Example:
        >>> are_entity_tags(["B-place", "I-place", "O"]), are_entity_tags(["NOUN", "VERB"])
        (True, False)
    """
    marked = [tag for tag in tags if tag != _OUTSIDE]
    return bool(marked) and all(tag[0] in _PREFIXES and tag[1:2] == "-" and len(tag) > 2 for tag in marked)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one sentence, read as CoNLL's script ``conlleval`` reads them.

    An entity ends before ``O``, before ``B-`` and where what it is changes; so ``I-`` may begin one (IOB1, or a mistake
    of a model). ``E-`` and ``L-`` end it, ``S-`` and ``U-`` are one by themselves (IOBES, BILOU).

    Args:
        tags: One tag for each word.

    Example:
        >>> sorted(entities(["B-person", "I-person", "O", "I-place", "B-place"]))
        [('person', 0, 1), ('place', 3, 3), ('place', 4, 4)]
    """
    found: set[Entity] = set()
    start, before, what_before = 0, _OUTSIDE, ""
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, what = tag[0], tag[2:]
        goes_on = prefix in ("I", *_LAST) and before in ("B", "I") and what == what_before
        if before != _OUTSIDE and not goes_on:
            found.add((what_before, start, place - 1))
        if not goes_on:
            start = place
        before, what_before = prefix, what
    return found


class EntityF1(Metric):
    r"""Micro F1 of whole entities: one counts as found only if its kind, its first and its last word are right.

    .. math:: F_1 = \frac{2 \cdot \text{found}}{\text{predicted} + \text{actual}}

    The same numbers as those of ``conlleval`` and of the package ``seqeval`` in its default mode. It is 0 where there
    are no entities at all.

    Args:
        tags: The names of the tags, in the order of their numbers; see `are_entity_tags`.
        ignore_index: The target of tokens that count for nothing.

    Raises:
        ValueError: If tags are not those of entities.

    Example:
        >>> metric = EntityF1(["B-place", "I-place", "O"])
        >>> target = torch.tensor([[-100, 0, 1, 2], [-100, 2, 0, -100]])
        >>> predicted = torch.tensor([[2, 0, 1, 2], [2, 0, 2, 2]])
        >>> metric(predicted, target)
        tensor(0.5000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    found: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, tags: Sequence[str], ignore_index: int = IGNORE_INDEX, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not are_entity_tags(tags):
            raise ValueError(f"Expected tags such as B-place, I-place and O, got {', '.join(tags[:5])}.")
        self.tags = list(tags)
        self.ignore_index = ignore_index
        for name in ("found", "predicted", "actual"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Adds sentences.

        Args:
            predictions: Tags' numbers ``(sentences, tokens)``, or their probabilities ``(sentences, tags, tokens)``.
            target: The right numbers ``(sentences, tokens)``.
        """
        if predictions.ndim == target.ndim + 1:
            predictions = predictions.argmax(1)
        for row, truth in zip(predictions.tolist(), target.tolist(), strict=True):
            counting = [(p, t) for p, t in zip(row, truth, strict=True) if t != self.ignore_index]
            predicted = entities([self.tags[p] for p, _ in counting])
            actual = entities([self.tags[t] for _, t in counting])
            self.found += len(predicted & actual)
            self.predicted += len(predicted)
            self.actual += len(actual)

    @override
    def compute(self) -> Tensor:
        """The score, from 0 to 1."""
        return 2 * self.found / (self.predicted + self.actual).clamp(min=1)
