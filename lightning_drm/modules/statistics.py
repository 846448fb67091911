r"""Statistics of a task's data, from batches that go through the task's own module.

**Gram matrices** of the inputs of each linear layer, :math:`G = \frac{1}{R} \sum_i x_i x_i^T` over all R inputs
(RegMean, arXiv 2212.09849). Labels are not used. The published code counts the positions of padding, too; here they are
left out unless asked for. Each expert of a layer has its own inputs and its own matrix (see `expert_grams.py`). Cost:
one forward pass, R n² for each set of inputs, and n² of memory for each; where these have no room together, there are
several passes.

**Diagonal Fisher information**, :math:`F = \frac{1}{N} \sum_x \sum_y p(y|x)\,(\partial \log p(y|x))^2`, over all N
examples x and all classes y, by the model's own probabilities (Fisher merging, arXiv 2111.09832). Cost: one backward
pass for each example and class, and the memory of all parameters once more.

Modules are in evaluation mode meanwhile, so that dropout changes nothing and nothing is computed twice to save memory;
they run as they were written, not as they were compiled; and they stay as they are. Ranks each take
batches of their own, and all get the sums.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_drm.deltas import backbone_layers, backbone_parameters
from lightning_drm.deltas.compiled import eagerly
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.kinds import IGNORE_INDEX, LABELS
from lightning_drm.modules.expert_grams import ExpertGrams, inputs_of_experts, is_weight_of_experts
from lightning_drm.modules.input_grams import LINEAR, CalledApartError, InputGrams
from lightning_drm.modules.measurement import run_forward
from lightning_drm.modules.protocol import class_logits, classify


def gram_matrices(
    module: nn.Module,
    head: Sequence[str],
    names: Set[str],
    batches: Iterable[Any],
    *,
    count_padding: bool = False,
    max_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gram matrices of the inputs of a module's linear layers and experts.

    Args:
        module: A task's module, trained.
        head: Names of its head.
        names: The parameters whose layers count; what is no weight of a linear layer or of experts is left out.
        batches: This rank's batches, on the module's device; they may be gone through several times.
        count_padding: Whether the positions of padding count.
        max_bytes: How much memory the sums may take together, of one pass; each has at least one layer's.
        ranks: The processes.

    Returns:
        Matrices (n, n) in float32 on the CPU, (experts, n, n) of experts, by the name of the first parameter that has
        them, and that name by parameter.

    Raises:
        ValueError: If no rank has a batch.
    """
    layers = {
        name: layer
        for name, layer in backbone_layers(module, head).items()
        if name in names and ((name.endswith("weight") and isinstance(layer, LINEAR)) or _is_of_experts(name, layer))
    }
    matrices: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    for some in _passes(layers, max_bytes):
        found, own = _one_pass(module, some, batches, count_padding, ranks)
        leaders |= own
        for name in dict.fromkeys(own.values()):
            total, num_rows = found.get(name, (torch.zeros(_shape(name, layers[name]), dtype=torch.float64), 0))
            count = torch.tensor([float(num_rows)], dtype=torch.float64)
            matrices[name] = (ranks.sum(total.cpu()) / ranks.sum(count)).float()
        del found
    return matrices, leaders


def fisher_information(
    module: nn.Module, head: Sequence[str], names: Set[str], batches: Iterable[Any], *, ranks: Ranks = ALONE
) -> tuple[dict[str, Tensor], float]:
    """Diagonal Fisher information of a classifier.

    Args:
        module: A task's module, trained, which gives class logits (batch, classes).
        head: Names of its head.
        names: The parameters that are wanted; buffers are left out.
        batches: This rank's batches, on the module's device; best of one example each.
        ranks: The processes.

    Returns:
        By name, a tensor of the parameter's shape in float32 on the CPU; and the norm of all of them together.

    Raises:
        ValueError: If the module gives no class logits, weights are quantized, or no rank has a batch.
    """
    wanted = {name: p for name, p in backbone_parameters(module, head).items() if name in names}
    if quantized := [name for name, parameter in wanted.items() if parameter.quantized is not None]:
        raise ValueError(
            f"Fisher information is taken of gradients of whole weights, and {quantized[0]} is quantized: leave fisher "
            "out, or load the base in a floating-point precision."
        )
    parameters = {name: p.tensor for name, p in wanted.items() if isinstance(p.tensor, nn.Parameter)}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in parameters.items()}
    num_examples = torch.zeros(1, dtype=torch.float64)
    with _evaluating(module), _differentiable(parameters.values()), torch.enable_grad():
        for batch in batches:
            log_p = _class_logits(module, batch).float().log_softmax(-1)
            num_examples += len(log_p)
            for of_example in log_p:
                for value in of_example:
                    grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
                    probability = float(value.detach().exp())
                    for total, grad in zip(sums.values(), grads, strict=True):
                        if grad is not None:
                            total.addcmul_(grad.float(), grad.float(), value=probability)
            del log_p, of_example, value, grads
    if not ranks.sum(num_examples):
        raise ValueError("There are no batches to take Fisher information from.")
    found = {name: ranks.sum(total.cpu()).div_(float(num_examples)) for name, total in sums.items()}
    squares = [float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in found.values()]
    return found, sum(squares) ** 0.5


def _one_pass(
    module: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], count_padding: bool, ranks: Ranks
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    """The sums of some layers by leader, and the leader by layer, on which the ranks agree."""
    with_experts = {name: layer for name, layer in layers.items() if _is_of_experts(name, layer)}
    linear = {name: layer for name, layer in layers.items() if name not in with_experts}
    for sharing in (True, False):
        grams = InputGrams(linear, sharing=sharing)
        of_experts = ExpertGrams(with_experts, grams.counted)
        with grams, of_experts, _evaluating(module), torch.no_grad():
            try:
                for batch in batches:
                    grams.padding = {} if count_padding else _padding(batch, layers)
                    run_forward(module, batch)
                leaders: dict[str, str] | None = {**grams.leaders(), **{name: name for name in of_experts.sums()}}
            except CalledApartError:
                leaders = None
        known = ranks.gather(leaders)
        if None not in known and all(other in ({}, max(known, key=len)) for other in known):
            if not any(known) and layers:
                raise ValueError("There are no batches to take Gram matrices from.")
            return {**grams.sums(), **of_experts.sums()}, cast(dict[str, str], max(known, key=len))
    raise AssertionError("layers that share nothing are never called apart, and ranks have the same layers")


def _passes(layers: Mapping[str, nn.Module], max_bytes: int | None) -> Iterator[dict[str, nn.Module]]:
    """Layers whose sums have room together, in order."""
    some: dict[str, nn.Module] = {}
    taken = 0
    for name, layer in layers.items():
        size = 8 * prod(_shape(name, layer))
        if some and max_bytes is not None and taken + size > max_bytes:
            yield some
            some, taken = {}, 0
        some[name] = layer
        taken += size
    if some:
        yield some


def _is_of_experts(name: str, layer: nn.Module) -> bool:
    return is_weight_of_experts(layer, name.rpartition(".")[2])


def _shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    """Of the Gram matrix, or matrices, of a parameter's inputs."""
    if _is_of_experts(name, layer):
        number, size = inputs_of_experts(layer, name.rpartition(".")[2])
        return number, size, size
    size = layer.in_features if isinstance(layer, nn.Linear) else len(cast(Tensor, layer.weight))
    return size, size


def _padding(batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """By stack, which positions of a batch are no padding, as far as the batch says."""
    if not isinstance(batch, Mapping):
        return {}
    masks = {}
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.ndim > 1:
        masks["encoder"] = mask.bool().reshape(-1, mask.shape[-1])
    parts = {part for name in layers for part in name.split(".")}
    if {"encoder", "decoder"} <= parts:
        mask, labels = batch.get("decoder_attention_mask"), batch.get(LABELS)
        if isinstance(mask, Tensor):
            masks["decoder"] = mask.bool()
        elif isinstance(labels, Tensor) and labels.ndim == 2:
            masks["decoder"] = labels != IGNORE_INDEX  # its inputs are the labels, moved by one position
    return masks


def _class_logits(module: nn.Module, batch: Any) -> Tensor:
    logits, target = classify(module, batch)
    found = class_logits(module, logits, target)
    if found is not None and target.ndim == 1:
        return found
    raise ValueError(
        "Fisher information is taken of class probabilities, so it needs logits (batch, classes) and one class for "
        f"each example; {type(module).__name__} gives logits {tuple(logits.shape)} and targets {tuple(target.shape)}."
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with eagerly():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def _differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets frozen parameters have gradients, such as a weight under an adapter."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
