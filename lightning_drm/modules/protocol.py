"""What a module must say about itself to be merged and tested as one of several tasks.

Its *head*: the submodules or parameters named by ``head_names``; everything else is its backbone, shared by all tasks.
Its *score*: the name of a metric that its ``test_step`` logs. Without one it is judged by accuracy, or by its
``metric`` if it has one, of its *logits and targets*: by a method ``classify(batch)``, unless batches are pairs
``(inputs, targets)`` and the module's output is the logits.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_drm.kinds import Kind


@runtime_checkable
class Classifies(Protocol):
    """A task's module that computes its logits and targets itself."""

    def classify(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, classes)`` and targets ``(batch,)`` of one batch."""
        ...


def can_classify(module: nn.Module, batch: Any) -> bool:
    """Whether `classify` takes this batch.

    Args:
        module: A task's module.
        batch: A batch of its data.
    """
    return isinstance(module, Classifies) or (isinstance(batch, list | tuple) and len(batch) == 2)


def classify(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and targets of one batch.

    Args:
        module: A task's module.
        batch: A batch of its data.

    Returns:
        Logits ``(batch, classes)`` and targets ``(batch,)``.

    Raises:
        TypeError: If the module has no ``classify`` and the batch is not a pair.
    """
    if isinstance(module, Classifies):
        return module.classify(batch)
    if not can_classify(module, batch):
        raise TypeError(
            f"{type(module).__name__} has no `classify(batch)` and its batch is a {type(batch).__name__}, not a pair "
            "(inputs, targets): define `classify(self, batch)` that returns logits and targets."
        )
    return module(batch[0]), batch[1]


def class_logits(module: nn.Module, logits: Tensor, target: Tensor) -> Tensor | None:
    """Logits ``(…, classes)`` whose softmax says how likely each class is; ``None`` where there are no classes.

    The module's kind of task tells, or else shapes and types do.

    Args:
        module: A task's module.
        logits: What `classify` returned.
        target: The targets with it.
    """
    kind = getattr(module, "kind", None)
    if isinstance(kind, Kind):
        return kind.class_logits(logits.float(), target)
    are_classes = logits.ndim == 2 and logits.shape[1] > 1 and target.ndim == 1 and not target.is_floating_point()
    return logits if are_classes else None


def head_names_of(module: nn.Module, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a module's head: those given, else its own ``head_names``.

    Args:
        module: A task's module.
        given: Names that take precedence.

    Raises:
        ValueError: If there are neither.
    """
    names = given if given is not None else getattr(module, "head_names", None)
    if names is None or isinstance(names, str):
        raise ValueError(
            f"{type(module).__name__} does not say which parameters are its head: give it `head_names`, a list of the "
            "names of its head's submodules or parameters (an empty one if all is shared), or pass `head=[…]`."
        )
    return tuple(names)
