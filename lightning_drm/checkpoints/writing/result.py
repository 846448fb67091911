"""What a merge did, for the caller and for the model card."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_drm.checkpoints.planning import Plan
from lightning_drm.checkpoints.writing.sidecars import license_of
from lightning_drm.fusion.described import facts_on_kinds
from lightning_drm.fusion.model_card import model_card

SURVIVED = "how far the merged change goes along the task's own; 100 % for the task alone"
"""What the fraction that survived means, for those who read it."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge of checkpoints wrote.

    Attributes:
        folder: The output.
        output_format: ``full`` or ``adapter``.
        num_merged: Number of parameters that were merged.
        num_kept: Number of parameters that are the base's.
        num_resumed: Number of parameters that an earlier, interrupted merge had already written.
        survived: By task, the fraction of its delta that survived the merge, measured along the delta on a sample of
            the written values: 1 for one task alone, about 1 / N for the average of N unrelated tasks.
        rounding: Rounding error of the written weights, relative to the merged deltas.
        rank_errors: By parameter, the relative error that a limit on the rank made.
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


def card_of(plan: Plan, result: MergeResult, fingerprints: Mapping[str, str]) -> str:
    """The model card of a merge of checkpoints.

    Args:
        plan: What was done.
        result: What came out.
        fingerprints: By task, the fingerprint of its files; the base's under an empty name.
    """
    base = plan.base.name
    facts = [f"parameters: {result.num_merged} merged, {result.num_kept} as in the base"]
    facts += facts_on_kinds(plan.treatments, plan.kinds, plan.shapes)
    if result.rounding:
        facts.append(f"rounding error: {result.rounding:.2e} of the merged delta")
    facts.append(f"survived: {SURVIVED}")
    if result.rank_errors:
        facts.append(f"rank limited, relative error at most {max(result.rank_errors.values()):.2e}")
    rows = {
        task.name: {
            "parameters with a delta": len(task.names),
            "source": task.input.path.name,
            "fingerprint": f"`{fingerprints[task.name]}`",
            "survived": _percent(result.survived.get(task.name)),
        }
        for task in plan.tasks
    }
    return model_card(
        plan.recipe,
        rows,
        base=base,
        base_fingerprint=fingerprints[""],
        library="peft" if result.output_format == "adapter" else "transformers",
        license=license_of(plan.base.folder),
        facts=[*facts, *result.notes],
    )


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.0f} %"
