"""A merged PEFT adapter: exactly the merged deltas, as factors that peft loads."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, TaskType
from torch import Tensor

from lightning_drm.deltas import TaskVector, load_task_vector, save_task_vector, write_tensors
from lightning_drm.engine.fuse import Fusion
from lightning_drm.engine.inputs.adapter import CONFIG_FILE, AdapterInput
from lightning_drm.engine.plan import Plan
from lightning_drm.engine.run_folder import write_json
from lightning_drm.merging import Delta, LowRank
from lightning_drm.ranks import Ranks

ADAPTER_FILE = "adapter_model.safetensors"
_PARTS = ".parts"  # the factors that each process merged
_WITH_OWN_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def write_adapter(folder: Path, plan: Plan, fusion: Fusion, share: Sequence[str], ranks: Ranks) -> dict[str, float]:
    """Merges and writes the adapter: each process its share, and the first one the file, since adapters are small.

    Args:
        folder: Where to.
        plan: A plan with an adapter as output.
        fusion: What merges it.
        share: The parameters that this process merges.
        ranks: All processes.

    Returns:
        The relative error by name, where the rank was limited.
    """
    own: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, factors, error in fusion.merge_low_rank(share, plan.rules.rank):
        own[name] = factors
        if error:
            errors[name] = error
    if ranks.size == 1:
        _write(folder, plan, own)
        return errors
    parts = [folder / _PARTS / str(rank) for rank in range(ranks.size)]
    kinds = {name: plan.kinds[name] for name in own}
    save_task_vector(TaskVector(f"rank {ranks.rank}", own, kinds, {}, {}), parts[ranks.rank])
    found = {name: error for some in ranks.gather(errors) for name, error in some.items()}
    if ranks.is_first:
        _write(folder, plan, {name: delta for part in parts for name, delta in load_task_vector(part).deltas.items()})
        shutil.rmtree(folder / _PARTS)
    return {name: found[name] for name in plan.kinds if name in found}


def _write(folder: Path, plan: Plan, merged: Mapping[str, Delta]) -> None:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    names = _own_names(plan)
    for name in plan.kinds:
        factors = merged[name]
        assert isinstance(factors, LowRank), f"{name}: only factors have a place in an adapter"
        module = names[name].removesuffix(".weight")
        ranks[module] = factors.rank
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
    # peft writes them in the order of a set, which differs from process to process.
    written = json.loads((folder / CONFIG_FILE).read_text())
    written["target_modules"] = sorted(written["target_modules"])
    write_json(folder / CONFIG_FILE, written)


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
