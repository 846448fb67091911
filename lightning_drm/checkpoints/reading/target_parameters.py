"""Which parameter each pair of factors is for, where an adapter has ``target_parameters``.

peft wraps a layer once for each of its parameters that get an adapter, each wrapper around the last one, in the order
in which the layer made them. On disk, the innermost pair is ``experts.base_layer.lora_A.weight`` where there are two,
and none of the names says which parameter it is for.
"""

from collections.abc import Mapping, Sequence

from lightning_drm.deltas import Kind


def plain_module(module: str) -> str:
    """A module's name without what its wrappers add.

    Example:
        >>> plain_module("layers.0.experts.base_layer")
        'layers.0.experts'
    """
    return ".".join(part for part in module.split(".") if part != "base_layer")


def adapted_parameters(
    module: str, wrapped: Sequence[str], targets: Sequence[str], kinds: Mapping[str, Kind], *, in_order: bool
) -> dict[str, str]:
    """The parameters of one layer that have factors.

    Args:
        module: The layer's plain name.
        wrapped: The names in the file of all that has factors there: the layer, and what is wrapped around it.
        targets: The adapter's ``target_parameters``.
        kinds: By name, what each of the base's parameters is to its layer.
        in_order: Whether they are in the order in which the model's class makes them.

    Returns:
        By one of `wrapped`, the name of its parameter; empty where the factors are those of a linear layer.

    Raises:
        ValueError: If it is not clear which is which.

    Example:
        >>> kinds = {"model.experts.gate_up_proj": "experts", "model.experts.down_proj": "experts"}
        >>> targets, wrapped = ["down_proj", "gate_up_proj"], ["model.experts", "model.experts.base_layer"]
        >>> adapted_parameters("model.experts", wrapped, targets, kinds, in_order=True)
        {'model.experts.base_layer': 'model.experts.gate_up_proj', 'model.experts': 'model.experts.down_proj'}
    """
    last = module.rpartition(".")[2]
    own = [name.rpartition(".")[2] for name, kind in kinds.items() if kind == "experts" and _layer(name) == last]
    names = [name for name in dict.fromkeys(f"{module}.{part}" for part in own) if _is_target(name, targets)]
    if not names and len(wrapped) == 1:
        return {}
    if len(names) != len(wrapped):
        raise ValueError(
            f"target_parameters names {len(names)} parameters of {module} that the base has, but there are factors for "
            f"{len(wrapped)}"
        )
    if len(names) > 1 and not in_order:
        raise ValueError(
            f"which factors of {module} are for which of target_parameters follows from the model's class, which the "
            "base does not tell; give a base with a config.json that transformers knows"
        )
    return dict(zip(sorted(wrapped, key=len, reverse=True), names, strict=True))


def _layer(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
