"""A whole merged model: base + merged deltas, in shards.

First come the parameters that are merged entry by entry: in pieces, and several at once. Then come the matrices, one
after the other, since their methods need them whole and use all cores.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_drm.checkpoints.deltas import BaseValues
from lightning_drm.checkpoints.planning import Plan, plan_costs
from lightning_drm.checkpoints.reading.tensors import SafetensorsFiles
from lightning_drm.checkpoints.writing.check import (
    Checked,
    Measured,
    require_finite,
    require_fits,
    require_plausible,
    summary,
)
from lightning_drm.checkpoints.writing.shards import ShardWriter
from lightning_drm.checkpoints.writing.sidecars import copy_companions
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion.fuse import Fusion, Merged
from lightning_drm.fusion.share_out import share_out
from lightning_drm.fusion.threads import num_threads, side_by_side


def write_model(
    plan: Plan,
    fusion: Fusion,
    values: BaseValues,
    writer: ShardWriter,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> Checked:
    """Merges, writes and checks the weights. Each process does its share; the first one adds the configuration.

    Args:
        plan: What is to be done.
        fusion: What merges it.
        values: The base's values.
        writer: Where to write; what it already has is not written again.
        progress: Called with the number of parameters that this process has done, and of those that it has to do.
        ranks: All processes.

    Returns:
        What the check found.

    Raises:
        ValueError: If a value is not finite, nothing of a task survived or too much of it, or the files are not what
            was planned.
    """
    folder, costs = writer.folder, plan_costs(plan)
    shares = share_out({name: costs[name] for name in writer.order if name not in writer.done}, ranks.size)
    left = sorted(shares[ranks.rank], key=lambda name: -prod(plan.headers[name].shape))
    done = _written(left, plan, fusion, values, writer)
    for num_done, _ in enumerate(done, start=1):
        if progress is not None:
            progress(num_done, len(left))
    checked = summary(writer.collect(), plan)
    if ranks.is_first:
        writer.finish()
        if plan.base.folder is not None:
            copy_companions(plan.base.folder, folder, plan.mismatch.dtype, dequantized=plan.base.is_dequantized)
        _require_headers(plan, folder)
    return checked


def _written(
    names: Sequence[str], plan: Plan, fusion: Fusion, values: BaseValues, writer: ShardWriter
) -> Iterator[None]:
    """Writes some tensors, and yields after each."""

    def write(name: str, pieces: Iterable[Merged]) -> None:
        record: dict[str, Any] = {}
        writer.write(name, _finished(name, pieces, plan, fusion, values, record), record)

    for name in [name for name in names if name not in plan.kinds]:
        writer.write(name, [_kept(name, plan)])
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


def _kept(name: str, plan: Plan) -> Tensor:
    value, dtype = plan.base.tensors.read(name), plan.headers[name].dtype
    written = value.to(dtype)
    if dtype != value.dtype and torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        require_fits(name, written, value)
    return written


def _finished(
    name: str, pieces: Iterable[Merged], plan: Plan, fusion: Fusion, values: BaseValues, record: dict[str, Any]
) -> Iterator[Tensor]:
    """The values of one parameter to write; what is measured on them goes into ``record``."""
    measured = Measured(fusion.tasks, plan.headers[name].shape)
    for merged in pieces:
        base = values.read(name, merged.rows).to(merged.delta.device, merged.delta.dtype)
        exact = base + merged.delta if plan.treatments[name].method is not None else base
        written = exact.to(plan.headers[name].dtype)
        largest = require_finite(name, written, exact)
        require_plausible(name, largest, base, fusion.tasks, merged.deltas)
        measured.add(exact, written, base, merged.deltas, merged.rows.start if merged.rows is not None else 0)
        yield written
        del merged, base, exact, written  # before the next piece comes
    record.update(measured.record())


def _require_headers(plan: Plan, folder: Path) -> None:
    found = SafetensorsFiles(sorted(folder.glob("model*.safetensors"))).headers
    if found != plan.headers:
        wrong = sorted(name for name in found.keys() | plan.headers.keys() if found.get(name) != plan.headers.get(name))
        raise ValueError(f"{folder} is not what was planned: {', '.join(wrong[:3])}.")
