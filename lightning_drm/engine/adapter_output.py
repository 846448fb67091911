"""A merged PEFT adapter: exactly the merged deltas, as factors that peft loads."""

from collections.abc import Iterable
from pathlib import Path

from peft import LoraConfig, TaskType
from torch import Tensor

from lightning_drm.deltas import write_tensors
from lightning_drm.engine.inputs.adapter import AdapterInput
from lightning_drm.engine.plan import Plan
from lightning_drm.merging import LowRank

ADAPTER_FILE = "adapter_model.safetensors"
_WITH_OWN_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def write_adapter(folder: Path, plan: Plan, merged: Iterable[tuple[str, LowRank, float]]) -> dict[str, float]:
    """Writes the adapter.

    Args:
        folder: Where to.
        plan: A plan with an adapter as output.
        merged: Name, factors and truncation error of each parameter.

    Returns:
        The relative error by name, where the rank was limited.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    names = _own_names(plan)
    for name, factors, error in merged:
        module = names[name].removesuffix(".weight")
        ranks[module] = factors.rank
        if error:
            errors[name] = error
        if plan.kinds[name] == "embedding":
            tensors[f"base_model.model.{module}.lora_embedding_A"] = factors.up.T
            tensors[f"base_model.model.{module}.lora_embedding_B"] = factors.down.T
            continue
        linear = factors.T if name in plan.transposed else factors
        tensors[f"base_model.model.{module}.lora_A.weight"] = linear.down
        tensors[f"base_model.model.{module}.lora_B.weight"] = linear.up
    config = _config(plan, ranks)
    write_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))
    return errors


def _config(plan: Plan, ranks: dict[str, int]) -> LoraConfig:
    """With alpha equal to the rank everywhere, peft's scaling is 1."""
    rank = max(ranks.values())
    others = {f"^{module.replace('.', chr(92) + '.')}": value for module, value in ranks.items() if value != rank}
    inputs = [task.input for task in plan.tasks]
    kinds = {found.config.get("task_type") for found in inputs if isinstance(found, AdapterInput)}
    kind = kinds.pop() if len(kinds) == 1 else None
    return LoraConfig(
        task_type=None if kind is None or kind in _WITH_OWN_HEAD else TaskType(kind),
        base_model_name_or_path=plan.base.name,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        fan_in_fan_out=any(name in plan.transposed for name in plan.kinds),
    )


def _own_names(plan: Plan) -> dict[str, str]:
    """The names that the adapters use, if they agree on them; the base's else."""
    used: dict[str, set[str]] = {name: set() for name in plan.kinds}
    for task in plan.tasks:
        for name, raw in task.names.items():
            used[name].add(raw)
    if any(len(names) > 1 for names in used.values()):
        return {name: name for name in plan.kinds}
    return {name: next(iter(names)) for name, names in used.items()}
