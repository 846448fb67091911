"""What a merge of files prints: its plan, and its result."""

from rich.console import Console
from rich.table import Table

from lightning_drm.checkpoints.planning import Plan, plan_costs, read_bytes, table, written_bytes
from lightning_drm.checkpoints.writing.result import SURVIVED, MergeResult
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion.share_out import balance


def print_plan(console: Console, plan: Plan, ranks: Ranks, memory: int) -> None:
    """Prints which rule merges what, what was found of each task, and what the merge takes.

    Args:
        console: Where to print.
        plan: The plan, which may have problems.
        ranks: The processes that would share the work.
        memory: Bytes of memory that it needs.
    """
    costs = plan_costs(plan)
    rules, total = Table("rule", "method", "for", "parameters", "values", "work", "such as"), sum(costs.values())
    for row in table(plan, costs):
        work = f"{100 * row.cost / total:.1f} %" if total else "–"
        rules.add_row(row.rule, row.method, row.what, str(len(row.names)), f"{row.num_values:,}", work, row.names[0])
    console.print(rules)
    tasks = Table("task", "format", "parameters", "head", "source")
    for task in plan.tasks:
        tasks.add_row(task.name, task.input.format, str(len(task.names)), str(len(task.head)), str(task.input.path))
    console.print(tasks)
    size = f"writes {written_bytes(plan) / 1e9:.2f} GB" if plan.output_format == "full" else "writes an adapter"
    console.print(f"Reads {read_bytes(plan) / 1e9:.2f} GB, {size}, needs about {memory / 1e9:.2f} GB of memory.")
    if ranks.size > 1 and not plan.problems:
        reached = balance(costs, ranks.size)
        console.print(
            f"The largest of {ranks.size} shares of the work is {reached.largest:.2f} × the mean; "
            f"as parameters stay whole, it cannot be less than {reached.possible:.2f} ×."
        )
    for note in plan.notes:
        console.print(f"Note: {note}")


def print_result(console: Console, result: MergeResult) -> None:
    """Prints how much was merged, the share of each task that survived, and where the result is.

    Args:
        console: Where to print.
        result: What was done.
    """
    for note in result.notes:
        console.print(f"Note: {note}")
    if result.num_resumed:
        console.print(f"Resumed an interrupted merge, which had written {result.num_resumed} parameters.")
    if result.survived:
        shares = Table("task", "survived", caption=f"Survived: {SURVIVED}.")
        shares.columns[1].justify = "right"
        for task, share in result.survived.items():
            shares.add_row(task, f"{100 * share:.0f} %")
        console.print(shares)
    console.print(f"Merged {result.num_merged} parameters; {result.num_kept} stayed as in the base.")
    if result.rounding:
        console.print(f"Rounding changed the merged delta by {result.rounding:.1e} of its size.")
    if result.rank_errors:
        largest = max(result.rank_errors.values())
        console.print(f"Limiting the rank changed a parameter's delta by at most {largest:.1e} of its size.")
    console.print(f"Wrote {result.folder} ({result.output_format}).")
