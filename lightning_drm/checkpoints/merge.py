"""Merging models from files: plan, stream, check, and only then show the result under its name.

At no time are more than two parameters of all tasks in memory: the one that is merged, and the next, which is read
meanwhile; of those that are merged entry by entry, some pieces. Everything is written into a hidden folder beside the
output; a merge that was killed is taken up there by the next one with the same arguments, and the folder gets its name
when it is whole and checked.

Several processes share a merge: each plans it by itself, merges its share of the parameters and writes them to where
they belong; the first of them does what is done once. Nothing but counts and journals passes between them.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lightning_drm.checkpoints.deltas import BaseValues, FileDeltas
from lightning_drm.checkpoints.planning.plan import MismatchPolicy, Plan, make_plan, plan_costs, refuse, written_bytes
from lightning_drm.checkpoints.reading import quick_fingerprint
from lightning_drm.checkpoints.writing.adapter import read_adapter, write_adapter
from lightning_drm.checkpoints.writing.check import measure_factors, require_finite, require_present, summary
from lightning_drm.checkpoints.writing.model import write_model
from lightning_drm.checkpoints.writing.shards import JOURNAL_FILE, ShardWriter
from lightning_drm.checkpoints.writing.sidecars import license_of
from lightning_drm.deltas import TaskVector, fingerprint
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.fusion.fuse import Fusion
from lightning_drm.fusion.model_card import model_card
from lightning_drm.fusion.recipe import Recipe
from lightning_drm.fusion.share_out import share_out
from lightning_drm.pretrained import resolve_pretrained
from lightning_drm.storage import only_one, write_tensors

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeResult:
    """What a merge from files wrote.

    Attributes:
        folder: The output.
        output_format: ``full`` or ``adapter``.
        num_merged: How many parameters were merged.
        num_kept: How many are the base's.
        num_resumed: How many an earlier, interrupted merge had written already.
        survived: By task, the fraction of its delta that the written model has along it, measured on a sample.
        rounding: Rounding error of the written weights relative to the merged deltas.
        rank_errors: Relative error by parameter, where the rank was limited.
        notes: What a user should know.
    """

    folder: Path
    output_format: str
    num_merged: int
    num_kept: int
    num_resumed: int = 0
    survived: Mapping[str, float] = field(default_factory=dict)
    rounding: float = 0.0
    rank_errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def merge_files(
    base: str,
    models: Mapping[str, str],
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    mismatch: MismatchPolicy | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    device: str = "cpu",
    push_to_hub: str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> MergeResult:
    """Merges finetuned models that are on disk or on the hub.

    Args:
        base: The model they all started from: a folder, a file or a hub name.
        models: By task, its finetune: a model folder, a PEFT adapter, a checkpoint or a run folder, or a hub name.
        output: The folder to write.
        recipe: How to merge; DRM by default.
        mismatch: What to do about what does not fit; refuse by default.
        overwrite: Replace the folder if it exists.
        max_shard_size: Largest size of a written file.
        device: Where to compute.
        push_to_hub: Name of a repository to upload the result to.
        progress: Called with the number of parameters that this process has done and how many it has.
        ranks: The processes that share the work, all of which make this call; this one alone if left out.

    Returns:
        What was done.

    Raises:
        ValueError: With every problem that the headers show, before anything is written; or if deltas are not finite,
            or a task has left no trace in the result; or if another process is merging into the same folder.
    """
    recipe, mismatch, output = recipe or Recipe(), mismatch or MismatchPolicy(), Path(output)
    plan = make_plan(base, models, recipe, mismatch)
    refuse([*plan.problems, *output_problems(plan, output, overwrite)])
    partial = _partial_of(output)
    with only_one(output, f"merging into {output}") if ranks.is_first else nullcontext():
        if ranks.is_first:  # again: another merge may have ended before this one got the lock
            refuse(output_problems(plan, output, overwrite))
        result = _write(plan, partial, output, max_shard_size, device, progress, ranks)
        if ranks.is_first:
            _show(partial, output)
        ranks.wait()
    if push_to_hub is not None and ranks.is_first:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=output, commit_message="Merged with lightning_drm")
    return result


def _write(
    plan: Plan,
    partial: Path,
    output: Path,
    max_shard_size: str,
    device: str,
    progress: Progress | None,
    ranks: Ranks,
) -> MergeResult:
    """Writes everything, under a hidden name."""
    recipe, base = plan.recipe, plan.base.name
    costs = plan_costs(plan)
    share = share_out({name: costs[name] for name in plan.kinds}, ranks.size)[ranks.rank]
    values = BaseValues(plan.base.tensors)
    vectors = [
        TaskVector(task.name, FileDeltas(task, values), {name: plan.kinds[name] for name in task.names}, {}, {})
        for task in plan.tasks
    ]
    fusion = Fusion(
        recipe,
        vectors,
        device,
        transposed=plan.transposed,
        shapes=plan.shapes,
        in_pieces=plan.in_pieces,
        share=set(share),
        reduce=ranks.sum,
    )
    if ranks.is_first:
        _clear_leftovers(partial)
    fingerprints = _fingerprints(plan)
    if plan.output_format == "adapter":
        result = _write_adapter(plan, fusion, share, partial, output, ranks)
    else:
        identity = fingerprint({**fingerprints, "recipe": f"{recipe!r} {plan.mismatch!r} {max_shard_size}"})
        writer = ShardWriter(partial, plan.headers, max_shard_size, identity, ranks)
        num_resumed = len(writer.done)
        kept, rounding = write_model(plan, fusion, values, writer, progress, ranks)
        num_kept = len(plan.kept) + sum(treatment.method is None for treatment in plan.treatments.values())
        counts = len(plan.headers) - num_kept, num_kept, num_resumed
        notes = (*plan.notes, *_without_deltas(kept))
        result = MergeResult(output, "full", *counts, kept, rounding, notes=notes)
    if not ranks.is_first:
        return result
    changed = [task or "the base" for task, found in _fingerprints(plan).items() if found != fingerprints[task]]
    if changed:
        raise ValueError(f"The files of {', '.join(changed)} were changed while they were merged: merge again.")
    _write_heads(plan, partial)
    card = model_card(
        recipe,
        {
            task.name: {
                "parameters with a delta": len(task.names),
                "source": task.input.path.name,
                "fingerprint": f"`{fingerprints[task.name]}`",
                "kept": _percent(result.survived.get(task.name)),
            }
            for task in plan.tasks
        },
        base=base if not Path(resolve_pretrained(base)).exists() else Path(base).name,
        base_fingerprint=fingerprints[""],
        library="peft" if plan.output_format == "adapter" else "transformers",
        license=license_of(plan.base.folder),
        facts=_facts(result),
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    return result


def _fingerprints(plan: Plan) -> dict[str, str]:
    """What tells each task's files from others, and the base's under an empty name."""
    files = {task.name: task.input.files for task in plan.tasks}
    return {name: quick_fingerprint(paths) for name, paths in {**files, "": plan.base.tensors.files}.items()}


def output_problems(plan: Plan, output: Path, overwrite: bool) -> list[str]:
    """What keeps the output from being written."""
    problems = []
    if output.exists() and not (output.is_dir() and (overwrite or not any(output.iterdir()))):
        problems.append(f"{output} exists; choose another --output, or --overwrite true.")
    inputs = [plan.base.folder, *(task.input.path for task in plan.tasks)]
    if any(folder is not None and folder.exists() and output.exists() and output.samefile(folder) for folder in inputs):
        problems.append(f"{output} is one of the inputs.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free + _held_by(_partial_of(output)), written_bytes(plan)
    if plan.output_format == "full" and needed > free:
        problems.append(f"{output} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left.")
    return problems


def _write_adapter(
    plan: Plan, fusion: Fusion, share: Sequence[str], partial: Path, output: Path, ranks: Ranks
) -> MergeResult:
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    errors = write_adapter(partial, plan, fusion, share, ranks)
    shares = ranks.gather(_check_adapter(plan, fusion, partial) if ranks.is_first else {})[0]
    notes = (*plan.notes, *_without_deltas(shares))
    return MergeResult(output, "adapter", len(plan.kinds), 0, 0, shares, rank_errors=errors, notes=notes)


def _check_adapter(plan: Plan, fusion: Fusion, folder: Path) -> dict[str, float]:
    """Reads the adapter back; what it has kept of each task."""
    records = []
    for name, factors in read_adapter(folder, plan):
        for part in (factors.up, factors.down):
            require_finite(name, part)
        parts = {vector.task: vector.deltas[name] for vector in fusion.vectors if name in vector.deltas}
        records.append(measure_factors(factors, list(parts), list(parts.values())))
    shares, _ = summary(records, fusion.tasks)
    require_present(plan, shares)
    return shares


def _without_deltas(shares: Mapping[str, float]) -> list[str]:
    return [f"{task}: all its deltas are zero." for task, share in shares.items() if math.isnan(share)]


def _write_heads(plan: Plan, partial: Path) -> None:
    for task in plan.tasks:
        tensors: dict[str, Tensor] = dict(task.input.head)
        for raw in task.head:
            value = task.input.read(raw)
            if not isinstance(value, Tensor):
                raise ValueError(f"{task.name}: its head has an adapter at {raw}; save it as modules_to_save.")
            tensors[raw] = value.clone()
        if tensors:
            write_tensors(partial / "heads" / f"{task.name}.safetensors", tensors, {"task": task.name})


def _facts(result: MergeResult) -> list[str]:
    facts = [f"parameters: {result.num_merged} merged, {result.num_kept} as in the base"]
    if result.rounding:
        facts.append(f"rounding error: {result.rounding:.2e} of the merged delta")
    if result.rank_errors:
        facts.append(f"rank limited, relative error at most {max(result.rank_errors.values()):.2e}")
    return [*facts, *result.notes]


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.0f} %"


def _clear_leftovers(partial: Path) -> None:
    """Keeps of an interrupted merge what can be taken up: shards with their journal."""
    if partial.is_dir() and not (partial / JOURNAL_FILE).is_file():
        shutil.rmtree(partial)
    elif partial.is_dir():
        for folder in [entry for entry in partial.iterdir() if entry.is_dir()]:
            shutil.rmtree(folder)


def _partial_of(output: Path) -> Path:
    """The hidden folder in which an output is written."""
    return output.with_name(f".{output.name}.partial")


def _held_by(partial: Path) -> int:
    """Bytes of the disk that an interrupted merge has; they are there for the next one, which takes them up or over."""
    try:
        return sum(file.stat().st_blocks * 512 for file in partial.rglob("*"))
    except FileNotFoundError:  # the merge was not interrupted, and has just ended
        return 0


def _show(partial: Path, output: Path) -> None:
    """Gives the finished folder its name."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)
