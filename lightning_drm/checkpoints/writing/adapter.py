"""A merged PEFT adapter: exactly the merged deltas, as factors that peft loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.checkpoints.reading.adapter import AdapterInput
from lightning_drm.checkpoints.reading.tensors import SafetensorsFiles
from lightning_drm.checkpoints.writing.check import Checked, measure_factors, require_finite, summary
from lightning_drm.deltas import TaskVector, load_task_vector, save_task_vector
from lightning_drm.deltas.adapters import ADAPTER_FILE, adapter_config, factor_names, write_adapter_files
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion.fuse import Fusion
from lightning_drm.merging import Delta, LowRank

if TYPE_CHECKING:
    from peft import LoraConfig

_SHARES = ".shares"  # the factors that each process merged
_WITH_OWN_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def write_adapter(
    folder: Path, plan: Plan, fusion: Fusion, share: Sequence[str], ranks: Ranks
) -> tuple[Checked, dict[str, float]]:
    """Merges, writes and checks the adapter.

    Each process merges its share. Adapters are small, so the first process writes the one file, and reads it back.

    Args:
        folder: Where to write; what is there is removed.
        plan: A plan with an adapter as output.
        fusion: What merges it.
        share: The parameters that this process merges.
        ranks: All processes.

    Returns:
        What the check found; and by parameter, the relative error of a limited rank.

    Raises:
        ValueError: If a factor is not finite, nothing of a task survived or too much of it, or the file is not what
            was planned.
    """
    if ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    ranks.wait()
    errors = _merge_and_write(folder, plan, fusion, share, ranks)
    checked = ranks.gather(_check(folder, plan, fusion) if ranks.is_first else None)[0]
    assert checked is not None
    return checked, errors


def _merge_and_write(folder: Path, plan: Plan, fusion: Fusion, share: Sequence[str], ranks: Ranks) -> dict[str, float]:
    own: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, factors, error in fusion.merge_low_rank(share, plan.mismatch.rank):
        own[name] = factors
        if error:
            errors[name] = error
    if ranks.size == 1:
        _write(folder, plan, own)
        return errors
    shares = [folder / _SHARES / str(rank) for rank in range(ranks.size)]
    kinds = {name: plan.kinds[name] for name in own}
    save_task_vector(TaskVector(f"rank {ranks.rank}", own, kinds, {}, {}), shares[ranks.rank])
    found = {name: error for some in ranks.gather(errors) for name, error in some.items()}
    if ranks.is_first:
        _write(
            folder,
            plan,
            {name: delta for of_rank in shares for name, delta in load_task_vector(of_rank).deltas.items()},
        )
        shutil.rmtree(folder / _SHARES)
    return {name: found[name] for name in plan.kinds if name in found}


def _write(folder: Path, plan: Plan, merged: Mapping[str, Delta]) -> None:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    names = _own_names(plan)
    for name in plan.kinds:
        factors = merged[name]
        assert isinstance(factors, LowRank), f"{name}: only factors have a place in an adapter"
        ranks[names[name].removesuffix(".weight")] = factors.rank
        a, b = _file_names(plan, names, name)
        linear = factors.T if _is_transposed(plan, name) else factors
        tensors[a], tensors[b] = linear.down, linear.up
    write_adapter_files(folder, _config(plan, ranks), tensors)


def _check(folder: Path, plan: Plan, fusion: Fusion) -> Checked:
    """Reads the adapter back, and compares it with the deltas."""
    records = []
    for name, factors in _read(folder, plan):
        require_finite(name, factors.up)
        require_finite(name, factors.down)
        deltas = fusion.deltas.present(name)
        records.append(measure_factors(factors, list(deltas), list(deltas.values())))
    return summary(records, plan)


def _read(folder: Path, plan: Plan) -> Iterator[tuple[str, LowRank]]:
    """Name and factors of each parameter, as they were written."""
    written, names = SafetensorsFiles([folder / ADAPTER_FILE]), _own_names(plan)
    if len(written.headers) != 2 * len(plan.kinds):
        raise ValueError(f"{folder} holds {len(written.headers)} factors, but {2 * len(plan.kinds)} were planned.")
    for name in plan.kinds:
        a, b = _file_names(plan, names, name)
        factors = LowRank(written.read(b), written.read(a))
        yield name, factors.T if _is_transposed(plan, name) else factors


def _file_names(plan: Plan, names: dict[str, str], name: str) -> tuple[str, str]:
    """The names of both factors; A, which is applied first, comes first."""
    return factor_names(names[name].removesuffix(".weight"), embedding=plan.kinds[name] == "embedding")


def _is_transposed(plan: Plan, name: str) -> bool:
    """Whether the file's factors make the transposed weight, as those of embeddings and of a Conv1D do."""
    return plan.kinds[name] == "embedding" or name in plan.transposed


def _config(plan: Plan, ranks: dict[str, int]) -> LoraConfig:
    inputs = [task.input for task in plan.tasks]
    kinds = {found.config.get("task_type") for found in inputs if isinstance(found, AdapterInput)}
    kind = kinds.pop() if len(kinds) == 1 else None
    return adapter_config(
        ranks,
        base=plan.base.name,
        task_type=None if kind in _WITH_OWN_HEAD else kind,
        fan_in_fan_out=any(name in plan.transposed for name in plan.kinds),
    )


def _own_names(plan: Plan) -> dict[str, str]:
    """The names that the adapters use, if they agree on them; otherwise the base's."""
    used: dict[str, set[str]] = {name: set() for name in plan.kinds}
    for task in plan.tasks:
        for name, raw in task.names.items():
            used[name].add(raw)
    if any(len(names) > 1 for names in used.values()):
        return {name: name for name in plan.kinds}
    return {name: next(iter(names)) for name, names in used.items()}
