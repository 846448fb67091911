"""A whole merged model: base + merged deltas, in shards.

What is merged entry by entry comes in pieces, several parameters at once; then, one after the other, the matrices whose
methods want them whole and all cores for themselves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_drm.checkpoints.deltas import BaseValues
from lightning_drm.checkpoints.planning.plan import Plan, plan_costs
from lightning_drm.checkpoints.reading.tensors import SafetensorsFiles
from lightning_drm.checkpoints.writing.check import measure, require_finite, require_present, summary
from lightning_drm.checkpoints.writing.shards import ShardWriter
from lightning_drm.checkpoints.writing.sidecars import copy_companions
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion.fuse import Fusion, Merged
from lightning_drm.fusion.pieces import num_threads, side_by_side
from lightning_drm.fusion.share_out import share_out


def write_model(
    plan: Plan,
    fusion: Fusion,
    values: BaseValues,
    writer: ShardWriter,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> tuple[dict[str, float], float]:
    """Merges and writes the weights, each process its share, and checks them; the first one adds the configuration.

    Args:
        plan: What is to be done.
        fusion: What merges it.
        values: The base's values.
        writer: Where to; what it has already is not written again.
        progress: Called with the number of parameters that this process has done and how many it has.
        ranks: All processes.

    Returns:
        By task, the share of its delta that the model has along it; and the rounding error relative to the merged
        deltas.

    Raises:
        ValueError: If something is not finite, nothing of a task is left, or files are not what was planned.
    """
    folder, costs = writer.folder, plan_costs(plan)
    shares = share_out({name: costs[name] for name in writer.order if name not in writer.done}, ranks.size)
    left = sorted(shares[ranks.rank], key=lambda name: -prod(plan.headers[name].shape))
    done = _written(left, plan, fusion, values, writer)
    for num_done, _ in enumerate(done, start=1):
        if progress is not None:
            progress(num_done, len(left))
    kept, rounding = summary(writer.collect(), fusion.tasks)
    require_present(plan, kept)
    if ranks.is_first:
        writer.finish()
        if plan.base.folder is not None:
            copy_companions(plan.base.folder, folder, plan.mismatch.dtype, dequantized=plan.base.is_dequantized)
        _require_headers(plan, folder)
    return kept, rounding


def _written(
    names: Sequence[str], plan: Plan, fusion: Fusion, values: BaseValues, writer: ShardWriter
) -> Iterator[None]:
    """Writes some tensors, and gives a sign after each."""

    def write(name: str, pieces: Iterable[Merged]) -> None:
        record: dict[str, Any] = {}
        writer.write(name, _finished(name, pieces, plan, fusion, values, record), record)

    for name in [name for name in names if name not in plan.kinds]:
        writer.write(name, [plan.base.tensors.read(name).to(plan.headers[name].dtype)])
        yield
    merged_names = [name for name in names if name in plan.kinds]
    fusion.calibrate()
    yield from side_by_side(
        lambda name: write(name, fusion.merge_in_pieces(name)),
        [name for name in merged_names if fusion.comes_in_pieces(name)],
        num_threads(fusion.device),
    )
    for merged in fusion.merge([name for name in merged_names if not fusion.comes_in_pieces(name)]):
        write(merged.name, [merged])
        del merged  # before the next parameter comes
        yield


def _finished(
    name: str, pieces: Iterable[Merged], plan: Plan, fusion: Fusion, values: BaseValues, record: dict[str, Any]
) -> Iterator[Tensor]:
    """The values to be written of one parameter; what is measured on the first piece of it goes into ``record``."""
    for merged in pieces:
        base = values.read(name, merged.rows).to(merged.delta.device, merged.delta.dtype)
        exact = base + merged.delta if plan.treatments[name].method is not None else base
        written = exact.to(plan.headers[name].dtype)
        require_finite(name, written, exact)
        if not record:
            record.update(measure(exact, written, base, fusion.tasks, merged.parts))
        yield written
        del merged, base, exact, written  # before the next piece comes


def _require_headers(plan: Plan, folder: Path) -> None:
    found = SafetensorsFiles(sorted(folder.glob("model*.safetensors"))).headers
    if found != plan.headers:
        wrong = sorted(name for name in found.keys() | plan.headers.keys() if found.get(name) != plan.headers.get(name))
        raise ValueError(f"{folder} is not what was planned: {', '.join(wrong[:3])}.")
