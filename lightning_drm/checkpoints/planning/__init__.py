"""The plan of a merge of files: every parameter matched with the base, and every problem known before any work."""

from lightning_drm.checkpoints.planning.plan import (
    MismatchPolicy,
    Plan,
    make_plan,
    memory_bytes,
    plan_costs,
    read_bytes,
    refuse,
    table,
    written_bytes,
)

__all__ = [
    "MismatchPolicy",
    "Plan",
    "make_plan",
    "memory_bytes",
    "plan_costs",
    "read_bytes",
    "refuse",
    "table",
    "written_bytes",
]
