"""The plan of a merge from files: made from headers alone, so every problem is known in seconds, before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch

from lightning_drm.checkpoints.architecture import Architecture
from lightning_drm.checkpoints.architecture.vocabulary import VocabularyPolicy
from lightning_drm.checkpoints.planning.planned_task import Matcher, MissingPolicy, PlannedTask
from lightning_drm.checkpoints.reading import BaseModel, TensorHeader, open_base, open_input
from lightning_drm.checkpoints.reading.adapter import AdapterInput
from lightning_drm.deltas import Kind
from lightning_drm.fusion.pieces import largest_piece, num_threads
from lightning_drm.fusion.recipe import Recipe, Treatment
from lightning_drm.fusion.share_out import costs
from lightning_drm.names import check_task_name

OutputFormat = Literal["auto", "full", "adapter"]
OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MismatchPolicy:
    """How a merge from files deals with what does not fit.

    Attributes:
        policy: Parameters that some task lacks, or that the base lacks.
        vocabulary: Vocabularies that differ.
        heads: Patterns of the heads' names; told from the models' classes if left out.
        output_format: A whole model, an adapter (all inputs must be adapters), or whatever is exact and smaller.
        dtype: Precision of the written weights; each parameter's own if ``auto``.
        rank: Largest rank of a merged adapter; as high as is exact if left out.
        dequantize: Read quantized weights as the floats that they stand for, and write floats.
    """

    policy: MissingPolicy = "strict"
    vocabulary: VocabularyPolicy = "strict"
    heads: list[str] | None = None
    output_format: OutputFormat = "auto"
    dtype: OutputDtype = "auto"
    rank: int | None = None
    dequantize: bool = False


@dataclass
class Plan:
    """What will be done with each parameter.

    Attributes:
        base: The base.
        recipe: How to merge.
        mismatch: What to do about mismatches.
        tasks: The tasks, in the order of their names.
        transposed: Names of weights stored ``(in, out)``.
        kinds: Kind of each merged parameter by name.
        treatments: What is done to it.
        headers: Every tensor of a whole merged model, as it will be written.
        output_format: ``full`` or ``adapter``.
        problems: Everything that keeps the merge from being done.
        notes: Everything that a user should know.
    """

    base: BaseModel
    recipe: Recipe
    mismatch: MismatchPolicy
    tasks: list[PlannedTask] = field(default_factory=list)
    transposed: frozenset[str] = frozenset()
    kinds: dict[str, Kind] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    headers: dict[str, TensorHeader] = field(default_factory=dict)
    output_format: Literal["full", "adapter"] = "full"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each merged parameter by name."""
        return {name: self.base.tensors.headers[name].shape for name in self.kinds}

    @property
    def in_pieces(self) -> frozenset[str]:
        """Names of the parameters that are merged a few rows at a time: by entry, and where all files can be mapped."""
        if not (self.base.tensors.is_mapped and all(task.input.is_mapped for task in self.tasks)):
            return frozenset()
        return frozenset(name for name, treatment in self.treatments.items() if treatment.works_in_pieces)

    @property
    def kept(self) -> list[str]:
        """Names of the tensors that stay as in the base."""
        return [name for name in self.headers if name not in self.kinds]


def make_plan(base: str, models: Mapping[str, str], recipe: Recipe, mismatch: MismatchPolicy) -> Plan:
    """Reads all headers and lays the recipe over them.

    Args:
        base: Path or hub name of the base.
        models: Path or hub name of each task's finetune.
        recipe: How to merge.
        mismatch: What to do about mismatches.

    Returns:
        The plan, with its problems listed.

    Raises:
        ValueError: If the base cannot be opened; every other problem is in the plan.
    """
    problems = _name_problems(models)
    inputs = {}
    for task, name in sorted(models.items()):
        try:
            inputs[task] = open_input(name, task, mismatch.dequantize)
        except ValueError as error:
            problems.append(f"{task}: {error}")
    is_recipe_sound = True
    try:
        recipe.check(list(models))
    except ValueError as error:
        is_recipe_sound = False
        problems.append(str(error))
    try:
        opened = open_base(base, mismatch.dequantize)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *problems])) from error
    architecture = Architecture.of_folder(opened.folder).named_like(set(opened.tensors.headers))
    matcher = Matcher(opened, architecture, mismatch.policy, mismatch.vocabulary, mismatch.heads)
    plan = Plan(opened, recipe, mismatch, [matcher.match(task, found) for task, found in inputs.items()])
    plan.transposed = architecture.transposed
    plan.problems = problems + [problem for task in plan.tasks for problem in task.problems]
    plan.notes = [note for task in plan.tasks for note in task.notes]
    if opened.is_dequantized:
        plan.notes.append(
            "The base is quantized; its weights were dequantized, and what quantization took is not back."
        )
    if not architecture.known:
        plan.notes.append("The base has no config.json that transformers knows: kinds are told from names and shapes.")
    _choose_parameters(plan, architecture, matcher, is_recipe_sound)
    if not plan.problems:
        _choose_output(plan)
    return plan


def _name_problems(models: Mapping[str, str]) -> list[str]:
    problems = [] if models else ["There is no model to merge; give at least one with --models.NAME PATH."]
    for task in models:
        try:
            check_task_name(task)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _choose_parameters(plan: Plan, architecture: Architecture, matcher: Matcher, is_recipe_sound: bool) -> None:
    headers = plan.base.tensors.headers
    merged = {name for task in plan.tasks for name in task.names}
    if plan.mismatch.policy == "intersection":
        merged -= {name for task in plan.tasks for name in task.missing}
        for task in plan.tasks:
            task.names = {name: raw for name, raw in task.names.items() if name in merged}
    if plan.mismatch.vocabulary == "intersection":
        _intersect_rows(plan)
    tasks = [task.name for task in plan.tasks]
    plan.kinds = {name: architecture.kind(name, header.shape) for name, header in headers.items() if name in merged}
    dtype = None if plan.mismatch.dtype == "auto" else getattr(torch, plan.mismatch.dtype)
    plan.headers = {
        name: TensorHeader(header.shape, dtype if dtype and header.dtype.is_floating_point else header.dtype)
        for name, header in headers.items()
        if name not in matcher.ties
    }
    if not tasks:
        return
    plan.problems += plan.recipe.problems(plan.kinds, plan.shapes)
    if is_recipe_sound:
        plan.treatments = {name: plan.recipe.treatment(name, kind, tasks) for name, kind in plan.kinds.items()}
    if not merged and not plan.problems:
        plan.problems.append("No parameter is left to merge.")


def _intersect_rows(plan: Plan) -> None:
    for name in {name for task in plan.tasks for name in task.rows}:
        maps = [task.rows[name] for task in plan.tasks if name in task.rows]
        common = torch.stack(maps).min(0).values >= 0
        for task in plan.tasks:
            if name in task.names:
                own = task.rows.get(name, torch.arange(len(common)))
                task.rows[name] = torch.where(common, own, -1)


def _choose_output(plan: Plan) -> None:
    reasons = _reasons_against_adapter(plan)
    wanted = plan.mismatch.output_format
    if wanted == "adapter" and reasons:
        plan.problems.append(f"The output cannot be an adapter: {'; '.join(reasons)}.")
    plan.output_format = "adapter" if not reasons and wanted != "full" else "full"
    if plan.output_format == "full" and plan.mismatch.rank is not None:
        plan.problems.append("rank limits a merged adapter, but the output is a whole model.")
    if plan.mismatch.rank is not None and plan.mismatch.rank < 1:
        plan.problems.append(f"rank must be at least 1, got {plan.mismatch.rank}.")
    if plan.output_format == "adapter" and plan.mismatch.dtype != "auto":
        plan.problems.append("An adapter is written in float32, which is exact; leave out dtype.")


def _reasons_against_adapter(plan: Plan) -> list[str]:
    reasons = [f"{task.name} is {task.input.format}" for task in plan.tasks if not isinstance(task.input, AdapterInput)]
    for task in plan.tasks:
        dense = [name for name, raw in task.names.items() if not task.input.entries[raw].rank]
        if dense and not reasons:
            reasons.append(f"{task.name} changes {dense[0]} in full")
    for name, treatment in plan.treatments.items():
        method = treatment.method
        if method is None or treatment.split is not None:
            reasons.append(f"{name} is {'kept' if method is None else 'split'} by an override")
        elif not method.supports_low_rank:
            reasons.append(f"with {type(method).__name__}, {method.not_low_rank}")
    return list(dict.fromkeys(reasons))[:5]


def plan_costs(plan: Plan) -> dict[str, float]:
    """What each tensor of a whole merged model costs, as far as headers tell; merged ones first."""
    ranks: dict[str, int] = {}
    for name in plan.kinds:
        entries = [task.input.entries[task.names[name]] for task in plan.tasks if name in task.names]
        if all(entry.rank for entry in entries):
            ranks[name] = sum(entry.rank for entry in entries)
    treatments = {**plan.treatments, **dict.fromkeys(plan.kept)}
    shapes = {**plan.shapes, **{name: plan.headers[name].shape for name in plan.kept}}
    return costs(treatments, shapes, len(plan.tasks), ranks)


def read_bytes(plan: Plan) -> int:
    """How much is read once from all files."""
    total = 0
    for task in plan.tasks:
        for raw in task.names.values():
            entry = task.input.entries[raw]
            numel = entry.rank * sum(entry.shape) if entry.rank else prod(entry.shape)
            total += numel * entry.dtype.itemsize
    return total + sum(prod(header.shape) * header.dtype.itemsize for header in plan.base.tensors.headers.values())


def written_bytes(plan: Plan) -> int:
    """How much a whole merged model takes."""
    return sum(prod(header.shape) * header.dtype.itemsize for header in plan.headers.values())


def memory_bytes(plan: Plan, device: torch.device) -> int:
    """About how much memory a merge needs beside the interpreter and its libraries.

    Of what is merged as a whole it is two stacks of the largest parameter, and the method's copies of one; of what is
    merged in pieces, one stack for each thread.
    """
    num_tasks, in_pieces = len(plan.tasks), plan.in_pieces
    whole = max((prod(shape) for name, shape in plan.shapes.items() if name not in in_pieces), default=0)
    piece = max((largest_piece(plan.shapes[name], device) for name in in_pieces), default=0)
    return 4 * max(whole * (3 * num_tasks + 4), piece * (num_tasks + 4) * num_threads(device))


def table(plan: Plan) -> list[tuple[str, str, int, int, str]]:
    """The rules that apply: rule, method, number of parameters, number of values, an example."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, treatment in plan.treatments.items():
        rows.setdefault((treatment.rule, repr(treatment.method) if treatment.method else "–"), []).append(name)
    if plan.kept:
        rows["kept", "–"] = plan.kept
    headers: Mapping[str, TensorHeader] = plan.headers
    return [
        (rule, method, len(names), sum(prod(headers[name].shape) for name in names), names[0])
        for (rule, method), names in rows.items()
    ]


def refuse(problems: Sequence[str]) -> None:
    """Raises one error with all problems.

    Raises:
        ValueError: If there are any.
    """
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        raise ValueError(f"This cannot be merged, {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
