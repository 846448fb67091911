"""Merging checkpoints: read, plan, merge, check, publish.

Each step is a folder or file of its own. `reading` opens every input from its headers, `planning` matches them with the
base and lists every problem before any work is done. Then deltas are read, merged and written one parameter at a time:
no more than two parameters of all tasks are in memory at any time, the one that is merged and the next one, which is
read ahead; of parameters that are merged entry by entry, only a few pieces are. What was written is checked. All of it
happens in a hidden folder beside the output, which gets its name when it is whole. A merge that was killed is taken up
there by the next one with the same arguments.

Several processes share a merge: each makes the same plan, merges its share of the parameters and writes them where they
belong, and the first process does whatever is done once. Only counts and journals pass between them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy
from lightning_drm.checkpoints.deltas import BaseValues, FileDeltas
from lightning_drm.checkpoints.planning import (
    MismatchPolicy,
    MissingPolicy,
    OutputDtype,
    OutputFormat,
    Plan,
    make_plan,
    plan_costs,
    refuse,
)
from lightning_drm.checkpoints.reading import quick_fingerprint
from lightning_drm.checkpoints.writing.adapter import write_adapter
from lightning_drm.checkpoints.writing.model import write_model
from lightning_drm.checkpoints.writing.output_folder import OutputFolder
from lightning_drm.checkpoints.writing.result import MergeResult, card_of
from lightning_drm.checkpoints.writing.shards import ShardWriter
from lightning_drm.checkpoints.writing.sidecars import notes_on_companions, write_heads
from lightning_drm.deltas import TaskVector, fingerprint
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.fusion.fuse import Fusion
from lightning_drm.fusion.recipe import Override, Recipe
from lightning_drm.fusion.share_out import share_out
from lightning_drm.merging import DRM, Method
from lightning_drm.storage import write_text, writing

_SETTINGS = {".json", ".yaml", ".txt", ".model"}  # what models, adapters and tokenizers are described in

Progress = Callable[[int, int], None]


def merge_checkpoints(
    base: str | os.PathLike[str],
    models: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    method: Method = DRM(),
    coefficients: Mapping[str, float] | None = None,
    *,
    convolutions: Literal["average", "matrix"] = "average",
    non_matrix: Literal["average", "elect"] = "average",
    overrides: Sequence[Override] = (),
    policy: MissingPolicy = "strict",
    vocabulary: VocabularyPolicy = "strict",
    heads: Sequence[str] | None = None,
    output_format: OutputFormat = "auto",
    dtype: OutputDtype = "auto",
    rank: int | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    device: str | torch.device = "cpu",
    push_to_hub: str | None = None,
    private: bool | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> MergeResult:
    """Merges finetuned models that are on disk or on the hub into one, without loading any of them.

    Model folders, litgpt folders, PEFT adapters, checkpoints and run folders may be mixed. ``lightning-drm merge``
    calls this function; its options have the same names.

    Args:
        base: The model that all of them started from: a folder, a file, ``package:…`` or a hub name.
        models: By task, its finetune: a model folder (of transformers or litgpt), a PEFT adapter, a checkpoint, a run
            folder or a hub name.
        output: The folder to write. ``from_pretrained`` loads it (or peft, for an adapter);
            ``heads/<task>.safetensors`` in it holds the head of each task that has one.
        method: The merging method.
        coefficients: By task, its coefficient; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` lets a matrix method merge convolution weights as ``(out, in·k·k)`` matrices;
            ``"average"`` treats them like embeddings.
        non_matrix: How to merge what a matrix method does not take: by the weighted ``"average"`` of all tasks, or of
            those that ``"elect"`` the same sign.
        overrides: Exceptions by name; the first one that matches a parameter applies.
        policy: What to do about parameters that a task or the base lacks: refuse (``"strict"``), merge only what all
            have (``"intersection"``), or count what a task lacks as unchanged by it (``"base_fill"``).
        vocabulary: What to do about vocabularies that differ: refuse (``"strict"``), keep the base's tokens
            (``"base"``), or merge only the tokens that all have (``"intersection"``).
        heads: Shell patterns of the heads' names; known from the models' classes if left out.
        output_format: A whole model (``"full"``), an adapter (``"adapter"``, if all models are adapters), or the
            smaller one that is exact (``"auto"``).
        dtype: Precision of the written weights; each parameter's own if ``"auto"``.
        rank: Largest rank of a merged adapter; as high as is exact if left out.
        dequantize: Read quantized weights as the floats that they stand for, and write floats.
        overwrite: Replace the output if it exists.
        max_shard_size: Largest size of a written file.
        device: Where to compute.
        push_to_hub: Name of a repository to upload the result to. What is uploaded is printed before.
        private: Whether a repository that is made for it is private; as the hub has it for its owner if left out.
        progress: Called with the number of parameters that this process has done, and of those that it has to do.
        ranks: The processes that share the work, all of which make this call; this one alone if left out.

    Returns:
        What was written, and the fraction of each task's delta that survived.

    Raises:
        ValueError: With every problem that the headers show, before anything is written; or if deltas are not finite,
            nothing of a task survived, or another process is merging into the same folder.

    Example:
        >>> import torch
        >>> from safetensors.torch import load_file, save_file
        >>> from lightning_drm import TaskArithmetic, merge_checkpoints
        >>> folder = getfixture("tmp_path")
        >>> save_file({"fc.weight": torch.zeros(2, 2)}, folder / "base.safetensors")
        >>> for task, value in {"sst2": 1.0, "rte": 2.0}.items():
        ...     save_file({"fc.weight": torch.full((2, 2), value)}, folder / f"{task}.safetensors")
        >>> models = {"sst2": folder / "sst2.safetensors", "rte": folder / "rte.safetensors"}
        >>> method = TaskArithmetic(scale=0.5)
        >>> result = merge_checkpoints(folder / "base.safetensors", models, folder / "merged", method, {"rte": 2.0})
        >>> load_file(result.folder / "model.safetensors")["fc.weight"]
        tensor([[2.5000, 2.5000],
                [2.5000, 2.5000]])
    """
    recipe = Recipe(method, dict(coefficients or {}), convolutions, non_matrix, tuple(overrides))
    patterns = list(heads) if heads is not None else None
    mismatch = MismatchPolicy(policy, vocabulary, patterns, output_format, dtype, rank, dequantize)
    paths = {task: os.fspath(path) for task, path in models.items()}
    plan = make_plan(os.fspath(base), paths, recipe, mismatch)
    folder = OutputFolder(Path(output))
    refuse([*plan.problems, *folder.problems(plan, overwrite), *_upload_problems(push_to_hub, private)])
    with folder.locked() if ranks.is_first else nullcontext():
        if ranks.is_first:  # again: another merge may have ended before this one got the lock
            refuse(folder.problems(plan, overwrite))
            folder.clear_leftovers()
        with writing(folder.path):
            try:
                result = _merge(plan, folder, max_shard_size, device, progress, ranks)
            except ValueError as error:
                _blame_base(plan, error)
                raise
            if ranks.is_first:
                folder.publish()
        ranks.wait()
    if push_to_hub is not None and ranks.is_first:
        _upload(folder.path, push_to_hub, private)
    return result


def _merge(
    plan: Plan,
    folder: OutputFolder,
    max_shard_size: str,
    device: str | torch.device,
    progress: Progress | None,
    ranks: Ranks,
) -> MergeResult:
    """Merges and writes everything into the hidden folder, and checks it."""
    costs, values = plan_costs(plan), BaseValues(plan.base.tensors)
    share = share_out({name: costs[name] for name in plan.kinds}, ranks.size)[ranks.rank]
    fusion = Fusion(
        plan.recipe,
        _task_vectors(plan, values),
        device,
        transposed=plan.transposed,
        shapes={name: header.shape for name, header in plan.base.tensors.headers.items()},
        in_pieces=plan.in_pieces,
        share=set(share),
        reduce=ranks.sum,
    )
    fingerprints = _fingerprints(plan)
    if plan.output_format == "adapter":
        beside: list[str] = []
        checked, rank_errors = write_adapter(folder.partial, plan, fusion, share, ranks)
        counts = len(plan.kinds), 0, 0
    else:
        recipe = f"{plan.recipe!r} {plan.mismatch!r} {max_shard_size}"
        identity = fingerprint({**fingerprints, "recipe": recipe, "settings": _fingerprint_of_settings(plan)})
        writer = ShardWriter(folder.partial, plan.headers, max_shard_size, identity, ranks)
        num_resumed = len(writer.done)
        checked, rank_errors = write_model(plan, fusion, values, writer, progress, ranks), {}
        num_kept = len(plan.kept) + sum(treatment.method is None for treatment in plan.treatments.values())
        beside = notes_on_companions(plan.base.folder) if plan.base.folder is not None else []
        counts = len(plan.headers) - num_kept, num_kept, num_resumed
    result = MergeResult(
        folder.path,
        plan.output_format,
        *counts,
        survived=checked.survived,
        rounding=checked.rounding,
        rank_errors=rank_errors,
        notes=(*plan.notes, *fusion.notes, *beside, *checked.notes),
    )
    if ranks.is_first:
        _require_unchanged(plan, fingerprints)
        write_heads(plan, folder.partial)
        write_text(folder.partial / "README.md", card_of(plan, result, fingerprints))
    return result


def _task_vectors(plan: Plan, values: BaseValues) -> list[TaskVector]:
    """The tasks' deltas, which are read when they are asked for."""
    return [
        TaskVector(
            task.name,
            FileDeltas(task, values),
            {name: plan.kinds[name] for name in task.names},
            {},
            {},
            statistics=task.statistics,
        )
        for task in plan.tasks
    ]


def _fingerprints(plan: Plan) -> dict[str, str]:
    """By task, the fingerprint of its files; the base's under an empty name."""
    files = {task.name: task.input.files for task in plan.tasks}
    return {name: quick_fingerprint(paths) for name, paths in {**files, "": plan.base.tensors.files}.items()}


def _fingerprint_of_settings(plan: Plan) -> str:
    """A hash of the files that say what tensors mean, and when the tensors were written, which most hashes miss."""
    files = [*plan.base.tensors.files, *(file for task in plan.tasks for file in task.input.files)]
    folders = [plan.base.folder, *(task.input.folder for task in plan.tasks)]
    beside = [file for folder in folders if folder is not None for file in sorted(folder.iterdir())]
    settings = quick_fingerprint([file for file in beside if file.suffix in _SETTINGS and file.is_file()])
    return f"{settings} {[file.stat().st_mtime_ns for file in files]}"


def _require_unchanged(plan: Plan, fingerprints: Mapping[str, str]) -> None:
    changed = [task or "the base" for task, found in _fingerprints(plan).items() if found != fingerprints[task]]
    if changed:
        raise ValueError(f"The files of {', '.join(changed)} were changed while they were merged: merge again.")


def _blame_base(plan: Plan, error: ValueError) -> None:
    """Raises another error if the base is not finite where a merge failed: its deltas look like the task's fault."""
    for name in [name for name in plan.kinds if name in str(error)]:
        if not plan.base.tensors.read(name).isfinite().all():
            file = plan.base.tensors.file_of.get(name, plan.base.name)
            raise ValueError(f"The base holds NaN or infinite values in {name}, in {file}.") from error


def _upload_problems(push_to_hub: str | None, private: bool | None) -> list[str]:
    unused = private is not None and push_to_hub is None
    return ["private is for the repository that push_to_hub names, but none is named."] if unused else []


def _upload(folder: Path, name: str, private: bool | None) -> None:
    from huggingface_hub import HfApi

    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    print(f"Uploading {len(files)} files to {name}: {', '.join(files)}", flush=True)
    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Merged with lightning_drm")
