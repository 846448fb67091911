"""The plan of a merge of checkpoints: every parameter matched with the base, and every problem known before any work.

`make_plan` opens the inputs, `Matcher` holds each against the base, and the `Plan` says what will be done with each
parameter. `sizes` estimates how much will be read, written and held in memory.
"""

from lightning_drm.checkpoints.planning.plan import Plan, PlannedRule, refuse, table
from lightning_drm.checkpoints.planning.planner import make_plan
from lightning_drm.checkpoints.planning.policy import MismatchPolicy, MissingPolicy, OutputDtype, OutputFormat
from lightning_drm.checkpoints.planning.sizes import disk_bytes, memory_bytes, plan_costs, read_bytes, written_bytes

__all__ = [
    "MismatchPolicy",
    "MissingPolicy",
    "OutputDtype",
    "OutputFormat",
    "Plan",
    "PlannedRule",
    "disk_bytes",
    "make_plan",
    "memory_bytes",
    "plan_costs",
    "read_bytes",
    "refuse",
    "table",
    "written_bytes",
]
