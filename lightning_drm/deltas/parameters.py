"""Which tensors of a live module are merged, and what they are called.

The tensors of a module fall into its head, which belongs to one task, and its backbone, which all tasks share. A name
here is the one that the tensor has in the plain module, without wrappers of peft, FSDP1 or `torch.compile` around it,
so that a full finetune and a LoRA finetune of one base speak of the same parameters, however they were trained. A tied
tensor is one parameter and has one name, its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_drm.deltas.fingerprint import hash_tensor
from lightning_drm.deltas.kinds import Kind, kind_of, output_embeddings
from lightning_drm.deltas.lora import adapter_rank, adapters_of
from lightning_drm.deltas.quantized import hash_stored, is_quantized, weight_shape
from lightning_drm.deltas.sharded import whole
from lightning_drm.deltas.wrappers import plain, unwrapped

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True)
class Parameter:
    """One tensor of a module, under its plain name.

    Attributes:
        tensor: The live tensor (a parameter, or a buffer that checkpoints hold), without its adapter.
        kind: Its part in its layer.
        adapter: The LoRA layer around it, where there is one.
        quantized: The layer that stores it in 4 or 8 bits, where one does; the tensor holds codes then.
    """

    tensor: Tensor
    kind: Kind
    adapter: LoraLayer | None = None
    quantized: nn.Module | None = None

    @property
    def adapter_rank(self) -> int | None:
        """The rank of its delta, where the adapter's delta is low-rank."""
        return adapter_rank(self.adapter) if self.adapter is not None else None

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, also where it is quantized."""
        return self.tensor.shape if self.quantized is None else weight_shape(self.quantized)

    def hash(self) -> str:
        """Hash of its values as they are stored. Where it is sharded all ranks ask for it."""
        return hash_tensor(whole(self.tensor)) if self.quantized is None else hash_stored(self.quantized)


def backbone_parameters(module: nn.Module, head: Sequence[str]) -> dict[str, Parameter]:
    """All floating-point tensors that the tasks share, and those that stand for some in 4 or 8 bits, by plain name.

    Buffers count (a batch norm's running statistics are learned too) where ``state_dict`` would hold them; integer
    buffers, such as counters and position tables, do not.

    Args:
        module: A task's module.
        head: Names of the submodules or parameters that are its head.

    Returns:
        Parameters in the module's own order.

    Raises:
        ValueError: If a name in ``head`` matches nothing, the head shares a tensor with the backbone, or an adapter
            changes a tied weight in one of its places only.
    """
    backbone: dict[str, Parameter] = {}
    in_head: dict[int, str] = {}
    outputs = output_embeddings(module)
    for name, parameter in _walk(module):
        if id(parameter.tensor) in outputs and parameter.kind == "matrix":
            parameter = replace(parameter, kind="output_embedding")
        if _is_head(name, head):
            in_head[id(parameter.tensor)] = name
        elif parameter.quantized is not None or parameter.tensor.is_floating_point():
            backbone[name] = parameter
    _require_found(head, in_head.values())
    tied = [f"{name} = {in_head[id(p.tensor)]}" for name, p in backbone.items() if id(p.tensor) in in_head]
    if tied:
        raise ValueError(
            f"The head shares weights with the backbone, so it cannot be kept per task: {', '.join(tied)}."
        )
    return _without_ties(backbone)


def backbone_layers(module: nn.Module, head: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that compute with the backbone's parameters, by the parameter's plain name.

    Under a LoRA adapter it is the layer that the adapter wraps.

    Args:
        module: A task's module.
        head: Names of the submodules or parameters that are its head.
    """
    names = backbone_parameters(module, head)
    return {name: layer for name, layer in _layers(module) if name in names}


def head_state(module: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
    """The head's tensors by plain name, live and not copied.

    Args:
        module: A task's module.
        head: Names of the submodules or parameters that are its head.

    Raises:
        ValueError: If a name in ``head`` matches nothing, or an adapter sits inside the head, or it is quantized.
    """
    state = {}
    for name, parameter in _walk(module):
        if _is_head(name, head):
            if parameter.adapter is not None:
                raise ValueError(f"{name}: the head is trained in full, so it takes no LoRA adapter; exclude it there.")
            if parameter.quantized is not None:
                raise ValueError(
                    f"{name}: the head is trained in full, but its weight is quantized; leave it out of the "
                    "quantization (llm_int8_skip_modules)."
                )
            state[name] = parameter.tensor
    _require_found(head, state)
    return state


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that store their weight in 4 or 8 bits, by the weight's plain name.

    Args:
        module: A task's module.
    """
    return {name: layer for name, layer in _layers(module) if name.endswith("weight") and is_quantized(layer)}


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    layer = plain(module)
    for name, _ in layer.named_parameters(recurse=False):
        yield prefix + name, layer
    for name, child in layer.named_children():
        yield from _layers(child, f"{prefix}{name}.")


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
    adapters = adapters_of(unwrapped(module))
    module = plain(module)
    for name, tensor in module.named_parameters(recurse=False):
        quantized = module if name == "weight" and is_quantized(module) else None
        yield prefix + name, Parameter(tensor, kind_of(module, name, tensor), adapters.get(name), quantized)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, Parameter(buffer, "other")
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _is_head(name: str, head: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in head)


def _require_found(head: Sequence[str], names: Iterable[str]) -> None:
    found = list(names)
    missing = [part for part in head if not any(_is_head(name, [part]) for name in found)]
    if missing:
        raise ValueError(f"The head {', '.join(map(repr, missing))} names no parameter of the module.")


def _without_ties(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    first: dict[int, str] = {}
    unique, divided = {}, []
    for name, parameter in parameters.items():
        if (found := first.setdefault(id(parameter.tensor), name)) == name:
            unique[name] = parameter
        elif parameter.adapter is not parameters[found].adapter:
            divided.append(f"{found} = {name}")
    if divided:
        raise ValueError(
            "A LoRA adapter changes one of two layers that share a weight, which is merged as one: "
            f"{', '.join(divided)}. Leave these layers out of target_modules."
        )
    return unique
