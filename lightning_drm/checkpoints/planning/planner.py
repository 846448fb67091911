"""Making a plan from headers alone, so that every problem is known in seconds, before any work is done.

The inputs are opened and matched with the base, then the recipe is laid over what they have in common, and last the
form of the output is chosen.
"""

from collections.abc import Mapping

import torch

from lightning_drm.checkpoints.architecture import Architecture
from lightning_drm.checkpoints.planning.matching import Matcher
from lightning_drm.checkpoints.planning.plan import Plan
from lightning_drm.checkpoints.planning.policy import MismatchPolicy
from lightning_drm.checkpoints.reading import TaskInput, TensorHeader, note_on_ignored, open_base, open_input
from lightning_drm.checkpoints.reading.adapter import AdapterInput
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import problem_of_statistics, treatments
from lightning_drm.fusion.depth import notes_on_depth, problems_of_depth
from lightning_drm.fusion.recipe import Recipe
from lightning_drm.names import check_task_name


def make_plan(base: str, models: Mapping[str, str], recipe: Recipe, mismatch: MismatchPolicy) -> Plan:
    """Reads all headers and lays the recipe over them.

    Args:
        base: Path or hub name of the base.
        models: By task, path or hub name of its finetune.
        recipe: How to merge.
        mismatch: What to do about what does not fit.

    Returns:
        The plan, with its problems listed.

    Raises:
        ValueError: If the base cannot be opened; all other problems are in the plan.
    """
    problems = [*mismatch.problems(), *_name_problems(models)]
    inputs = _opened(models, mismatch.dequantize, problems)
    is_recipe_sound = _is_sound(recipe, list(models), problems)
    try:
        opened = open_base(base, mismatch.dequantize)
        headers = opened.tensors.headers
        architecture = Architecture.of_folder(opened.folder, len(headers)).named_like(set(headers))
    except ValueError as error:
        raise ValueError("\n".join([str(error), *problems])) from error
    matcher = Matcher(opened, architecture, mismatch)
    plan = Plan(opened, recipe, mismatch, [matcher.match(task, found) for task, found in inputs.items()])
    plan.transposed = architecture.transposed.union(*(task.transposed for task in plan.tasks))
    plan.problems = problems + [problem for task in plan.tasks for problem in task.problems]
    plan.problems += matcher.problems() + _heads_without_values(plan)
    plan.problems += matcher.problems_of_heads() if not plan.problems else []
    plan.notes = [note for task in plan.tasks for note in task.notes]
    if opened.tensors.ignored:
        plan.notes.append(f"The base: {note_on_ignored(opened.tensors.ignored)}")
    if opened.is_dequantized:
        plan.notes.append("The base was dequantized; the precision that quantization took does not come back.")
    if opened.is_of_litgpt:
        plan.notes.append(
            "The base is litgpt's. What is written has the names that transformers gives its weights; "
            "`litgpt convert_to_litgpt` takes it back."
        )
    if not architecture.known:
        plan.notes.append(
            "The base has no config.json that transformers knows: kinds of parameters follow from names and shapes."
        )
    _choose_parameters(plan, architecture, matcher)
    if plan.tasks:
        plan.problems += recipe.problems(plan.kinds, plan.shapes, plan.transposed)
        plan.problems += problems_of_depth(recipe.method, headers)
        plan.notes += notes_on_depth(recipe.method, headers, plan.kinds)
        if is_recipe_sound:
            vectors = [TaskVector(task.name, {}, {}, {}, {}, statistics=task.statistics) for task in plan.tasks]
            plan.treatments = treatments(recipe, plan.kinds, [task.name for task in plan.tasks], vectors)
            if problem := problem_of_statistics(recipe.method, vectors):
                plan.problems.append(problem)
            plan.problems += _dense_where_factors_are_needed(plan)
        if not plan.kinds and not plan.problems:
            plan.problems.append("No parameter is left to merge.")
    if not plan.problems:
        _choose_output(plan)
    if not plan.problems and plan.output_format == "full":
        plan.problems += _rounded_to_bytes(plan)
    return plan


def _name_problems(models: Mapping[str, str]) -> list[str]:
    problems = [] if models else ["There is no model to merge: give at least one, by the name of its task, in models."]
    for task in models:
        try:
            check_task_name(task)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _opened(models: Mapping[str, str], dequantize: bool, problems: list[str]) -> dict[str, TaskInput]:
    inputs = {}
    for task, name in sorted(models.items()):
        try:
            inputs[task] = open_input(name, task, dequantize)
        except ValueError as error:
            problems.append(f"{task}: {error}")
    return inputs


def _is_sound(recipe: Recipe, tasks: list[str], problems: list[str]) -> bool:
    try:
        recipe.check(tasks)
    except ValueError as error:
        problems.append(str(error))
        return False
    return True


def _choose_parameters(plan: Plan, architecture: Architecture, matcher: Matcher) -> None:
    """Which parameters are merged, and every tensor of a whole merged model."""
    headers = plan.base.tensors.headers
    merged = {name for task in plan.tasks for name in task.names}
    if plan.mismatch.policy == "intersection":
        merged -= {name for task in plan.tasks for name in task.missing}
        for task in plan.tasks:
            task.names = {name: raw for name, raw in task.names.items() if name in merged}
    if plan.mismatch.vocabulary == "intersection":
        _intersect_rows(plan)
    plan.kinds = {name: architecture.kind(name, header.shape) for name, header in headers.items() if name in merged}
    dtype = plan.mismatch.torch_dtype
    plan.headers = {
        name: TensorHeader(header.shape, dtype if dtype and header.dtype.is_floating_point else header.dtype)
        for name, header in headers.items()
        if name not in matcher.ties
    }


def _intersect_rows(plan: Plan) -> None:
    """Leaves every task only the rows of tokens that all tasks have."""
    for name in {name for task in plan.tasks for name in task.rows}:
        maps = [task.rows[name] for task in plan.tasks if name in task.rows]
        common = torch.stack(maps).min(0).values >= 0
        for task in plan.tasks:
            if name in task.names:
                own = task.rows.get(name, torch.arange(len(common)))
                task.rows[name] = torch.where(common, own, -1)


def _heads_without_values(plan: Plan) -> list[str]:
    """One sentence for each task whose head would be written, but is stored as a difference."""
    problems = []
    for task in plan.tasks:
        changes = [raw for raw in task.head if task.input.entries[raw].form != "value"]
        if changes:
            problems.append(
                f"{task.name}: its head has a change and no value at {', '.join(changes[:3])}; heads are written as "
                "they were trained, so save it as modules_to_save, or leave it out of heads."
            )
    return problems


def _rounded_to_bytes(plan: Plan) -> list[str]:
    """A sentence if merged weights of a whole model would be written in the base's 8-bit floats."""
    dtypes = {name: plan.headers[name].dtype for name in plan.kinds if name in plan.headers}
    bytes_each = [name for name, dtype in dtypes.items() if dtype.is_floating_point and dtype.itemsize == 1]
    if not bytes_each:
        return []
    listed = ", ".join(bytes_each[:3])
    return [
        f"The base stores {len(bytes_each)} of the merged weights in 8-bit floats, to which the result would be "
        f"rounded ({listed}): set dtype to float32, bfloat16 or float16."
    ]


def _dense_where_factors_are_needed(plan: Plan) -> list[str]:
    """One sentence for each task that has whole deltas where the method merges factors only."""
    needs = {
        name: f"{type(treatment.method).__name__}: {treatment.method.only_low_rank}"
        for name, treatment in plan.treatments.items()
        if treatment.method is not None and treatment.method.only_low_rank
    }
    problems = []
    for task in plan.tasks:
        entries = task.input.entries
        dense = [name for name, raw in task.names.items() if name in needs and not entries[raw].rank]
        if dense:
            others = f" and {len(dense) - 1} other parameters" if len(dense) > 1 else ""
            problems.append(f"{needs[dense[0]]}, but {task.name} changes {dense[0]}{others} in full.")
    return problems


def _choose_output(plan: Plan) -> None:
    """A whole model or an adapter, and whether the user's wishes fit that."""
    reasons = _reasons_against_adapter(plan)
    wanted, rank = plan.mismatch.output_format, plan.mismatch.rank
    if wanted == "adapter" and reasons:
        plan.problems.append(f"The output cannot be an adapter: {'; '.join(reasons)}.")
    plan.output_format = "adapter" if not reasons and wanted != "full" else "full"
    if plan.output_format == "full" and rank is not None:
        plan.problems.append("rank limits a merged adapter, but the output is a whole model.")
    if rank is not None and rank < 1:
        plan.problems.append(f"rank must be at least 1, got {rank}.")
    if plan.output_format == "adapter" and plan.mismatch.dtype != "auto":
        plan.problems.append("An adapter is written in float32, which is exact; leave out dtype.")


def _reasons_against_adapter(plan: Plan) -> list[str]:
    reasons = [f"{task.name} is {task.input.format}" for task in plan.tasks if not isinstance(task.input, AdapterInput)]
    for task in plan.tasks:
        experts = [name for name in task.names if name in task.parts or plan.kinds[name] == "experts"]
        if experts and not reasons:
            reasons.append(f"{task.name} adapts experts ({task.names[experts[0]]}), which are written in full")
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
