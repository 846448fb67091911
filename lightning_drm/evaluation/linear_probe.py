"""The score that a finetune has to beat: a linear head trained on the untouched base's features.

The backbone runs once, without gradients, over some training samples; the head is then fitted to these features by the
task's own loss (multinomial logistic regression for classes, least squares for numbers), solved to convergence by
L-BFGS. This needs a head that is one linear layer on one vector per sample, or per token; for any other the base's
score would cost a finetune of its own, and is not computed.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional

from lightning_drm.kinds import IGNORE_INDEX
from lightning_drm.modules import TransformerTask, can_classify, classify

_WEIGHT_DECAY = 1e-4

Loss = Callable[[Tensor, Tensor], Tensor]


def linear_probe(
    module: nn.Module, head: Sequence[str], batches: Iterable[Any], max_batches: int
) -> dict[str, Tensor] | None:
    """Trains a linear head on frozen features.

    Args:
        module: A task's module with the base's backbone, on its device; not changed. The head of a `TransformerTask`
            is trained by its loss, any other by cross entropy.
        head: Names of its head.
        batches: Training batches.
        max_batches: How many of them to use at most.

    Returns:
        The head's tensors by name, on the module's device; ``None`` if the head is not one linear layer on vectors.
    """
    layer = _linear_head(module, head)
    if layer is None:
        return None
    features, targets = _features(module, layer, itertools.islice(batches, max_batches))
    if features is None or targets is None:
        return None
    loss = _loss_of(module)
    if loss is _cross_entropy and (targets.is_floating_point() or int(targets.max()) >= layer.out_features):
        return None  # these targets are no classes
    weight, bias = _fitted(features, targets, layer.out_features, loss)
    state = {f"{head[0]}.weight": weight.to(layer.weight)}
    return {**state, f"{head[0]}.bias": bias.to(layer.weight)}


def _linear_head(module: nn.Module, head: Sequence[str]) -> nn.Linear | None:
    layer = module.get_submodule(head[0]) if len(head) == 1 and head[0] in dict(module.named_modules()) else None
    return layer if isinstance(layer, nn.Linear) and "bias" in dict(layer.named_parameters()) else None


def _loss_of(module: nn.Module) -> Loss:
    return module.loss if isinstance(module, TransformerTask) else _cross_entropy


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


@torch.no_grad()
def _features(module: nn.Module, layer: nn.Linear, batches: Iterable[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Features ``(samples, dim)`` and their targets, or those of tokens; ``None`` where they do not belong together."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        moved = (move_data_to_device(batch, layer.weight.device) for batch in batches)
        targets = [classify(module, batch)[1] for batch in moved if can_classify(module, batch)]
    finally:
        hook.remove()
        for child, mode in modes.items():
            child.training = mode
    pairs = list(zip(seen, targets, strict=True)) if len(seen) == len(targets) else []
    if pairs and all(features.ndim == 3 and target.shape == features.shape[:2] for features, target in pairs):
        pairs = [(features[target != IGNORE_INDEX], target[target != IGNORE_INDEX]) for features, target in pairs]
    several = isinstance(module, TransformerTask) and module.kind is not None and module.kind.several_vectors
    if not pairs or any(
        features.ndim != 2 or (len(features) % len(target) if several else len(features) != len(target))
        for features, target in pairs
    ):
        return None, None
    return torch.cat([features for features, _ in pairs]), torch.cat([target for _, target in pairs])


def _fitted(features: Tensor, targets: Tensor, num_outputs: int, loss_of: Loss) -> tuple[Tensor, Tensor]:
    """Weight ``(outputs, dim)`` and bias ``(outputs,)`` in float64, on standardized features for a fast solve."""
    features = features.double()
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-8)
    standardized = (features - mean) / deviation
    weight = features.new_zeros(num_outputs, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = standardized @ weight.T + bias
        loss = loss_of(logits, targets) + _WEIGHT_DECAY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    scaled = weight.detach() / deviation
    return scaled, bias.detach() - scaled @ mean
