r"""What coefficients are learned by, on one batch of one task: its own loss, or the entropy of its predictions.

* ``labels``: the loss that the module's own ``training_step`` returns, so that any task and any user's module will do.
* ``entropy`` (AdaMerging, arXiv 2310.02575): with class probabilities :math:`p`, the mean of
  :math:`-\sum_c p_c \log p_c` over samples, or over the tokens that count. No label's value is looked at; of tokens,
  the labels say which ones count. There must be classes: numbers, several labels at once and texts are refused.

Modules stay in evaluation mode, as they are tested: no dropout.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from lightning import LightningModule
from torch import Tensor, nn

from lightning_drm.kinds import Kind
from lightning_drm.modules import can_classify, class_logits, classify, has_hook, logs_of, run_step

Objective = Literal["labels", "entropy"]

Loss: TypeAlias = Callable[[nn.Module, Any, int, Any], Tensor]
"""A task's module, a batch, its number and the Trainer in; the mean loss of the batch out."""


def loss_of(objective: Objective) -> Loss:
    """The loss by which coefficients are learned.

    Args:
        objective: By what.
    """
    return _by_labels if objective == "labels" else _by_entropy


def problem_of(module: nn.Module, batch: Any, objective: Objective) -> str | None:
    """Why a task has no such loss, to complete "Task 'stars' …"; ``None`` if it has.

    Args:
        module: The task's module.
        batch: A batch of its data.
        objective: By what coefficients are to be learned.
    """
    kind = type(module).__name__
    if objective == "labels":
        if not has_hook("training_step", module):
            return f"has no loss to learn from: {kind} has no training_step"
        if isinstance(module, LightningModule) and not module.automatic_optimization:
            return f"has no loss to learn from: the training_step of {kind} optimizes by itself"
        return None
    if not can_classify(module, batch):
        return f"has no class logits: {kind} has no classify(batch)"
    logits, target = classify(module, batch)
    if class_logits(module, logits, target) is not None:
        return None
    own = getattr(module, "kind", None)
    shown = f"its outputs are {tuple(logits.shape)}, its targets {target.dtype} {tuple(target.shape)}"
    return f"has no class logits: {f'its kind is {type(own).__name__}' if isinstance(own, Kind) else shown}"


def entropy(logits: Tensor) -> Tensor:
    r"""The mean entropy of predicted classes, :math:`-\sum_c p_c \log p_c` with :math:`p` the softmax of the logits.

    Args:
        logits: Shape ``(…, classes)``.

    Example:
        >>> import torch
        >>> entropy(torch.tensor([[0.0, 0.0], [0.0, 50.0]]))  # half of log 2
        tensor(0.3466)
    """
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _by_labels(module: nn.Module, batch: Any, batch_idx: int, trainer: Any) -> Tensor:
    with logs_of(module, trainer, {}):
        found = run_step(module, "training_step", batch, batch_idx)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"Expected a loss from the training_step of {type(module).__name__}, got {type(loss).__name__}."
        )
    return loss


def _by_entropy(module: nn.Module, batch: Any, batch_idx: int, trainer: Any) -> Tensor:
    logits = class_logits(module, *classify(module, batch))
    assert logits is not None, "such tasks were refused"
    return entropy(logits)
