"""A LoRA adapter out of merged factors: in a live module, and in the file that peft loads.

Alpha is equal to the rank everywhere, so that peft's scaling is 1 and the adapter is the factors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_drm.deltas.hashed_file import load_tensors
from lightning_drm.deltas.kinds import transposed_names
from lightning_drm.deltas.parameters import Parameter, backbone_parameters, head_state
from lightning_drm.merging import LowRank
from lightning_drm.pretrained import hub_name, hub_revision, public_name
from lightning_drm.storage import write_json, write_tensors
from lightning_drm.storage.json_files import read_object

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

AdapterParameters: TypeAlias = tuple[nn.Parameter, nn.Parameter]
"""A layer's A (r, in), which is applied first, and B (out, r)."""

_NAME = "merged"  # of an adapter in a live module


def adapter_config(
    ranks: Mapping[str, int], *, base: str | None, task_type: str | None = None, fan_in_fan_out: bool = False
) -> LoraConfig:
    """The configuration of an adapter whose layers may have different ranks.

    Args:
        ranks: Rank by name of the layer.
        base: The base model, as `resolve_pretrained` takes it.
        task_type: peft's name of the kind of task, where there is one for all of it.
        fan_in_fan_out: Whether layers store their weight (in, out).
    """
    from peft import LoraConfig, TaskType

    rank = max(ranks.values())
    others = {f"^{module.replace('.', chr(92) + '.')}": value for module, value in ranks.items() if value != rank}
    return LoraConfig(
        task_type=None if task_type is None else TaskType(task_type),
        base_model_name_or_path=None if base is None else hub_name(base) or public_name(base),
        revision=None if base is None else hub_revision(base),
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        fan_in_fan_out=fan_in_fan_out,
    )


def write_adapter_files(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter.

    Args:
        folder: Where to.
        config: Its configuration.
        tensors: Its factors, by the names that peft gives them.
    """
    write_tensors(folder / ADAPTER_FILE, dict(tensors), {"format": "pt"})
    config.save_pretrained(str(folder))
    # peft writes them in the order of a set, which differs from process to process.
    written = read_object(folder / CONFIG_FILE)
    written["target_modules"] = sorted(written["target_modules"])
    write_json(folder / CONFIG_FILE, written)


def factor_names(layer: str, *, embedding: bool) -> tuple[str, str]:
    """The names of both factors in the file; A, which is applied first, comes first.

    Args:
        layer: The layer's name in the model.
        embedding: Whether it is an embedding.
    """
    module = f"base_model.model.{layer}"
    if embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def adapter_parameters(
    module: nn.Module, head: Sequence[str], factors: Mapping[str, LowRank]
) -> dict[str, AdapterParameters]:
    """Merged factors as the parameters of an adapter, which several modules may share.

    Args:
        module: A task's module.
        head: Names of its head.
        factors: By parameter name.
    """
    found = _as_in_file(module, head, factors)
    return {
        name: (nn.Parameter(own.down, requires_grad=False), nn.Parameter(own.up, requires_grad=False))
        for name, own in found.items()
    }


def attach_adapter(module: nn.Module, head: Sequence[str], factors: Mapping[str, AdapterParameters]) -> None:
    """Puts an adapter into a module.

    Args:
        module: A task's module without adapters, which is changed.
        head: Names of its head.
        factors: What `adapter_parameters` gave.
    """
    if not factors:
        return
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    prefix, root = _adapted_model(module, head, factors.keys())
    ranks = {name.removeprefix(prefix).removesuffix(".weight"): len(a) for name, (a, _) in factors.items()}
    config = adapter_config(ranks, base=None, fan_in_fan_out=_is_stored_in_out(module, head, factors.keys()))
    inject_adapter_in_model(config, root, _NAME, low_cpu_mem_usage=True)
    for name, (a, b) in factors.items():
        layer = root.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
        assert isinstance(layer, LoraLayer)
        if _NAME in layer.lora_embedding_A:
            layer.lora_embedding_A[_NAME], layer.lora_embedding_B[_NAME] = a, b
        else:
            layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = a, b


def write_factors(folder: Path, module: nn.Module, head: Sequence[str], factors: Mapping[str, LowRank]) -> None:
    """Writes merged factors as an adapter of the model in a module.

    Args:
        folder: Where to.
        module: A task's module.
        head: Names of its head.
        factors: By parameter name.
    """
    prefix, root = _adapted_model(module, head, factors.keys())
    parameters = backbone_parameters(module, head)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, own in _as_in_file(module, head, factors).items():
        layer = name.removeprefix(prefix).removesuffix(".weight")
        a, b = factor_names(layer, embedding=parameters[name].kind == "embedding")
        tensors[a], tensors[b], ranks[layer] = own.down, own.up, own.rank
    base = getattr(root, "name_or_path", None)
    config = adapter_config(
        ranks,
        base=base or None,
        fan_in_fan_out=_is_stored_in_out(module, head, factors.keys()),
    )
    write_adapter_files(folder, config, tensors)


def read_factors(folder: Path, module: nn.Module, head: Sequence[str]) -> dict[str, LowRank]:
    """Reads back what `write_factors` wrote; nothing where the folder holds no adapter.

    Args:
        folder: The folder.
        module: A task's module.
        head: Names of its head.

    Raises:
        ValueError: If the adapter is damaged, or was made from another model.
    """
    if not (folder / CONFIG_FILE).is_file():
        return {}
    tensors = load_tensors(folder / ADAPTER_FILE, "an adapter")
    parameters = backbone_parameters(module, head)
    pairs: dict[str, LowRank] = {}
    used: set[str] = set()
    for prefix in _prefixes(module):
        for name, parameter in parameters.items():
            if not name.startswith(prefix) or name in pairs:
                continue
            layer = name.removeprefix(prefix).removesuffix(".weight")
            a, b = factor_names(layer, embedding=parameter.kind == "embedding")
            if a in tensors and b in tensors:
                pairs[name] = LowRank(tensors[b], tensors[a])
                used |= {a, b}
        if used == tensors.keys():
            break
        pairs, used = {}, set()
    found = _as_in_file(module, head, pairs)
    misfits = [name for name, own in found.items() if own.shape != parameters[name].shape]
    if not found or misfits:
        listed = ", ".join(misfits or sorted(tensors)[:1])
        raise ValueError(f"{folder} was made from another model: {listed} missing or of another shape.")
    return found


def _adapted_model(module: nn.Module, head: Sequence[str], names: Set[str]) -> tuple[str, nn.Module]:
    """The outermost transformers model that has all of these parameters, and none of the head; else all of the module.

    Returns:
        What its parameters' names begin with, and itself.
    """
    own = head_state(module, head).keys()
    for prefix in _prefixes(module):
        has_all = all(name.startswith(prefix) for name in names)
        if has_all and not any(name.startswith(prefix) for name in own):
            return prefix, module.get_submodule(prefix.removesuffix(".")) if prefix else module
    return "", module


def _prefixes(module: nn.Module) -> list[str]:
    models = [name for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    return [f"{name}." if name else "" for name in models] + [""]


def _as_in_file(module: nn.Module, head: Sequence[str], factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Factors turned where the file's make the transposed weight, as those of embeddings and of a Conv1D do."""
    parameters = backbone_parameters(module, head)
    turned = transposed_names(module, parameters) | {n for n in factors if parameters[n].kind == "embedding"}
    return {name: own.T if name in turned else own for name, own in factors.items()}


def _is_stored_in_out(module: nn.Module, head: Sequence[str], names: Set[str]) -> bool:
    parameters: Mapping[str, Parameter] = backbone_parameters(module, head)
    return bool(transposed_names(module, parameters) & names)
