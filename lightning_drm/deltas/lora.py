"""LoRA adapters as exact low-rank deltas.

A LoRA layer computes ``W + s · B A`` with ``A`` of shape ``(r, in)``, ``B`` of shape ``(out, r)`` and a scaling ``s``
from alpha, the rank and rsLoRA. Its delta therefore *is* the pair ``(s · B, A)``: no dense product is formed.
The scaling is read from the layer, where peft keeps the number it really multiplies with, and never recomputed.

LoRA on the experts of a layer, which are one 3-D weight, has a pair for each expert: peft's ``ParamWrapper`` keeps
their factors side by side in one A and one B. Several of them are nested where a layer has several such weights.

Variants whose effective weight is not ``W + s · B A`` (DoRA, …), or whose initialization moves the base weight
(PiSSA, OLoRA, …), would be silently wrong here, so they are refused by name.

Importing peft takes seconds, and a module has adapters only where peft was imported to make them, so nothing here
imports it before it is needed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lightning_drm.deltas.quantized import is_quantized
from lightning_drm.deltas.sharded import whole
from lightning_drm.merging import Delta, LowRank, LowRankStack

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

# Initializations that leave the base weight as it was; every other one subtracts something from it.
INITS_KEEPING_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def adapted_weight_delta(layer: LoraLayer, name: str) -> Delta:
    """The delta that a LoRA layer adds to the weight it wraps.

    Args:
        layer: A peft LoRA layer around a linear, embedding or convolution weight, or around a parameter.
        name: The weight's name, for messages.

    Returns:
        A `LowRank` pair in float32 with the scaling folded into ``up``, of the shape of the wrapped weight; a
        `LowRankStack` for experts; a dense tensor for convolutions, whose kernels are not a product of two matrices.

    Raises:
        ValueError: If the layer's variant has no exact delta.
    """
    from peft.tuners.lora import layer as lora_layers

    adapter = _single_adapter(layer, name)
    _refuse_inexact(layer, adapter, name)
    if isinstance(layer, lora_layers.ParamWrapper) and _wrapped(layer).ndim == 3:
        a, b = _weight(layer.lora_A[adapter]), _weight(layer.lora_B[adapter])
        scaling = float(layer.scaling[adapter])
        stack = expert_factors(a.detach().float(), b.detach().float() * scaling, layer.num_experts)
        return stack.T if _is_stored_in_out(layer) else stack
    if isinstance(layer, lora_layers.Linear | lora_layers.ParamWrapper) or is_quantized(layer.get_base_layer()):
        down, up = _weight(layer.lora_A[adapter]), _weight(layer.lora_B[adapter])
        transposed = bool(getattr(layer, "fan_in_fan_out", False))  # transformers' Conv1D stores (in, out)
    elif isinstance(layer, lora_layers.Embedding):
        down, up = whole(layer.lora_embedding_A[adapter]), whole(layer.lora_embedding_B[adapter])
        transposed = True  # the product is (dim, vocabulary), the weight its transpose
    else:
        assert isinstance(layer, lora_layers._ConvNd)
        return whole(layer.get_delta_weight(adapter).detach()).float()
    up = up.detach().float() * float(layer.scaling[adapter])
    down = down.detach().float().clone()
    return LowRank(down.T.contiguous(), up.T.contiguous()) if transposed else LowRank(up, down)


def expert_factors(a: Tensor, b: Tensor, num_experts: int) -> LowRankStack:
    """The factors of each expert, from those that peft keeps side by side.

    Args:
        a: All experts' A, one below the other, of shape (E r, in).
        b: All experts' B, of shape (out, r E): column j E + e is column j of expert e's.
        num_experts: E.

    Returns:
        Copies of the factors; the products have the shape (E, out, in).

    Example:
        >>> import torch
        >>> stack = expert_factors(torch.ones(4, 3), torch.tensor([[1.0, 10.0, 2.0, 20.0]]), num_experts=2)
        >>> stack.up[0], stack.up[1], stack.shape
        (tensor([[1., 2.]]), tensor([[10., 20.]]), torch.Size([2, 1, 3]))
    """
    up = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return LowRankStack(up.clone(memory_format=torch.contiguous_format), a.reshape(num_experts, -1, a.shape[1]).clone())


def adapters_of(module: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers around a layer, by the name of the parameter that each adapts.

    Args:
        module: A layer, with the wrappers of peft's that are around it.
    """
    if not _peft_is_imported():
        return {}
    from peft.tuners.lora import LoraLayer

    found: dict[str, LoraLayer] = {}
    while isinstance(module, LoraLayer):
        found[getattr(module, "parameter_name", "weight")] = module  # a ParamWrapper's
        module = module.base_layer
    return found


def adapter_rank(layer: LoraLayer) -> int | None:
    """The rank of what `adapted_weight_delta` gives, of each expert's pair in a stack; ``None`` where that is dense.

    Args:
        layer: A peft LoRA layer with one active adapter.
    """
    from peft.tuners.lora import layer as lora_layers

    return None if isinstance(layer, lora_layers._ConvNd) else int(layer.r[layer.active_adapters[0]])


def _weight(layer: nn.Module) -> Tensor:
    return whole(cast(Tensor, layer.weight))


def _single_adapter(layer: LoraLayer, name: str) -> str:
    active = list(layer.active_adapters)
    if len(active) != 1:
        raise ValueError(f"{name}: expected one active LoRA adapter, got {len(active)}: {', '.join(active) or 'none'}.")
    if layer.disable_adapters:
        raise ValueError(f"{name}: the LoRA adapter is disabled, so its delta is not part of the model; enable it.")
    if layer.merged:
        raise ValueError(f"{name}: the LoRA adapter is already merged into its weight; unmerge it before fitting.")
    return cast(str, active[0])


def _refuse_inexact(layer: LoraLayer, adapter: str, name: str) -> None:
    from peft.tuners.lora import layer as lora_layers

    exact = lora_layers.Linear | lora_layers.Embedding | lora_layers._ConvNd | lora_layers.ParamWrapper
    if not isinstance(layer, exact) and not is_quantized(layer.get_base_layer()):
        raise ValueError(
            f"{name}: LoRA around a {type(layer.get_base_layer()).__name__} ({type(layer).__name__}) is not supported, "
            "only around linear, embedding and convolution weights and those of experts, or around linear weights that "
            "bitsandbytes has quantized; leave it out of the targets."
        )
    if isinstance(layer, lora_layers.ParamWrapper) and layer.num_experts == 1 and _is_stored_in_out(layer):
        raise ValueError(
            f"{name}: peft adds the transposed product to a single expert that is stored (in, out), so "
            f"{layer.parameter_name} has no exact delta; leave it out of target_parameters."
        )
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise ValueError(
            f"{name}: the LoRA variant {variant} is not W + s·B·A, so it has no exact delta; use plain LoRA."
        )
    if layer.use_dora.get(adapter, False):
        raise ValueError(f"{name}: DoRA is not W + s·B·A, so it has no exact delta; use plain LoRA (use_dora: false).")
    if layer.lora_bias.get(adapter, False):
        raise ValueError(f"{name}: lora_bias adds a bias that the delta cannot hold; use lora_bias: false.")


def _wrapped(layer: ParamWrapper) -> Tensor:
    return cast(Tensor, getattr(layer.get_base_layer(), layer.parameter_name))


def _is_stored_in_out(layer: ParamWrapper) -> bool:
    """Whether experts are stored (in, out) each, as peft decides it."""
    return bool(getattr(layer.get_base_layer(), "is_transposed", False))


def refuse_unsupported_adapters(module: nn.Module) -> None:
    """Refuses, by name and all at once, adapters whose delta would be wrong.

    Args:
        module: Any module, with or without peft adapters in it.

    Raises:
        ValueError: Naming every layer and the reason.
    """
    if not _peft_is_imported():
        return
    from peft import PeftType
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    problems = []
    for name, child in module.named_modules():
        if isinstance(child, BaseTunerLayer) and not isinstance(child, LoraLayer):
            tuner = type(child).__module__.split(".")[2]  # peft.tuners.<tuner>.layer
            problems.append(f"{name}: {tuner} adapters are not supported, only LoRA is.")
        elif isinstance(child, AuxiliaryTrainingWrapper) and not isinstance(child, ModulesToSaveWrapper):
            problems.append(f"{name}: {type(child).__name__} (trainable_token_indices) is not supported.")
        elif isinstance(child, LoraLayer):
            try:
                _refuse_inexact(child, _single_adapter(child, name), name)
            except ValueError as error:
                problems.append(str(error))
        for adapter, config in _adapter_configs(child).items():
            if config.peft_type != PeftType.LORA:
                tuner = PeftType(config.peft_type).value
                problems.append(f"adapter {adapter!r}: {tuner} is not supported, only LoRA is.")
            init = getattr(config, "init_lora_weights", True)
            if init not in INITS_KEEPING_THE_BASE:
                problems.append(
                    f"adapter {adapter!r}: init_lora_weights={init!r} changes the base weights; use true or gaussian."
                )
    if problems:
        raise ValueError("Adapters that cannot be merged exactly:\n  " + "\n  ".join(dict.fromkeys(problems)))


def _adapter_configs(module: nn.Module) -> dict[str, PeftConfig]:
    configs = getattr(module, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def strip_adapter(module: nn.Module) -> nn.Module:
    """The module below peft's wrappers: a layer's base layer, a saved module's active copy, a `PeftModel`'s model."""
    if not _peft_is_imported():
        return module
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    while True:
        if isinstance(module, PeftModel):  # its own get_base_model asks for settings, which go with the adapters
            tuner = module.base_model
            module = tuner.model if isinstance(tuner, BaseTuner) else tuner
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]]
        else:
            return module


def _peft_is_imported() -> bool:
    return "peft" in sys.modules
