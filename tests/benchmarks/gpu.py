"""What merging takes on a GPU: every method on the matrices of real models, beside plain code and the card's own rates.

python tests/benchmarks/gpu.py [PART ...] [--device cpu --shapes tiny] [--seconds 120] [--output gpu.csv]

Parts are the rates of the card (``rates``) and the models (``vitb``, ``vitl``, ``lora``, ``llama``); all of them, if
none is named, in less than ten minutes on an H200. Deltas are random and made on the device. One matrix of each shape
is timed, and counts as often as the model has it. What a part has no time left for is said, and counts nowhere.

"Extra memory" is what a merge takes at its peak beside the deltas; a floor is what the card's rates, measured in the
same run, allow at best; "off the CPU" is the relative difference from the same merge on the CPU, of a corner of each
model's first matrix, but for entries that rounding decides. On a CPU the same code runs, to be tested there.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.card import Card, Rates
from benchmarks.gpu_cases import LARGEST_PLAIN, MODELS, PLAIN, Model, calibrated, floor, merge, methods_for
from helpers import ties
from helpers.devices import CPU, on
from lightning_drm.merging import DRM, TIES, KnOTS, LowRank, Method

CORNER = 640  # rows and columns that are compared: more than any method leaves to the host
EIGENPROBLEMS = {"real": (80, 512, 768, 1024, 2048, 3072, 4096, 8192, 14336), "tiny": (8, 16)}
PRODUCTS = {"real": 8192, "tiny": 64}


@dataclass(frozen=True)
class Bound:
    """What a model may take at most, in seconds, as it was asked for."""

    model: str
    method: str
    at_most: float


BOUNDS = [
    Bound("vitb", "DRM", 1.0),
    Bound("vitl", "DRM", 4.0),
    Bound("llama", "IsoC", 25.0),
    Bound("llama", "DRM", 300.0),
    Bound("lora", "DRM", 2.0),
    Bound("llama", "TIES", 1.0),
]
OFF_ELEMENTWISE, OFF = 1e-6, 3e-4  # relative differences from the CPU that were asked for


@dataclass
class Row:
    """One method on one model: a line of the table.

    Attributes:
        model: The model's key.
        method: The method's name.
        seconds: All matrices; ``None`` if the part's time was up.
        plain_seconds: Plain code on all matrices.
        floor_seconds: What the card's rates allow.
        extra_gb: Most memory beside one matrix's deltas.
        off_the_cpu: Relative difference from the CPU.
        left_out: What was not measured.
    """

    model: str
    method: str
    seconds: float | None = None
    plain_seconds: float | None = None
    floor_seconds: float | None = None
    extra_gb: float | None = None
    off_the_cpu: float | None = None
    left_out: str = ""


def bound_of(row: Row) -> Bound | None:
    """The bound that a line of the table has to keep."""
    return next((bound for bound in BOUNDS if (bound.model, bound.method) == (row.model, row.method)), None)


def method_of(row: Row) -> Method:
    """The method of a line of the table."""
    return methods_for(MODELS[row.model])[row.method]


def off_the_cpu(method: Method, model: Model, device: torch.device) -> float:
    """The relative difference of a merge on the device from the same one on the CPU."""
    shape = next(iter(model.shapes))
    corner = (min(shape[0], CORNER), min(shape[1], CORNER))
    deltas = on(CPU, model.deltas(corner, device))
    statistics = model.statistics(corner, method, device)
    there = merge(method, on(device, deltas), statistics).cpu()
    here = merge(method, deltas, statistics and [one.to(CPU) for one in statistics])
    if isinstance(method, DRM | KnOTS | TIES) and (method.elementwise or not isinstance(method, TIES)):
        dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]
        here = torch.where(ties.undecided(method, dense, there.dtype), there, here)
    return float((there.double() - here.double()).norm() / here.double().norm())


def measured(key: str, model: Model, card: Card, rates: Rates | None, seconds: float) -> Iterator[Row]:
    """Every method on a model, those with a bound first."""
    end = time.monotonic() + seconds
    for name, method in methods_for(model).items():
        row = Row(key, name)
        if time.monotonic() > end:
            row.left_out = "time was up"
            yield row
            continue
        row.off_the_cpu = off_the_cpu(method, model, card.device)
        total, lowest, plain, merging = 0.0, 0.0, 0.0, merge
        if method.elementwise:  # its passes over the model are cheap enough to be taken as they are
            of_shapes = {shape: model.deltas(shape, card.device) for shape in model.shapes}
            total = card.measure(partial(calibrated, method, model, of_shapes)).seconds
            method, merging = calibrated(method, model, of_shapes), Method.merge
            del of_shapes
        for shape, count in model.shapes.items():
            card.free()
            deltas, statistics = model.deltas(shape, card.device), model.statistics(shape, method, card.device)
            found = card.measure(partial(merging, method, deltas, statistics=statistics))
            total += count * found.seconds
            if found.peak_bytes is not None:
                row.extra_gb = max(row.extra_gb or 0.0, found.peak_bytes / 1e9)
            at_least = floor(method, model, shape, rates) if rates is not None else None
            lowest = float("nan") if at_least is None else lowest + count * at_least
            if name in PLAIN and not row.left_out:
                if min(shape) > LARGEST_PLAIN or time.monotonic() > end:
                    row.left_out = f"plain code from {shape[0]} × {shape[1]} on"
                else:
                    dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]
                    plain += count * card.measure(partial(PLAIN[name], dense), rounds=1).seconds
        row.seconds = total
        row.floor_seconds = lowest if lowest == lowest and rates is not None else None
        row.plain_seconds = plain if name in PLAIN and not row.left_out else None
        yield row


def card_table(card: Card, rates: Rates, shapes: str) -> Table:
    """The card's rates, and eigenproblems by size."""
    table = Table("size", "eigh, float64", "eigh, float32", title=f"{card.name}\n{_in_words(rates)}")
    for size in EIGENPROBLEMS[shapes]:
        found = [card.eigenproblem(size, dtype).seconds for dtype in (torch.float64, torch.float32)]
        table.add_row(str(size), *(f"{1e3 * seconds:.1f} ms" for seconds in found))
        card.free()
    return table


def model_table(title: str, rows: Sequence[Row], is_real: bool) -> Table:
    """What was measured on one model."""
    table = Table("method", "time", "at most", "plain code", "floor", "extra memory", "off the CPU", "", title=title)
    for row in rows:
        bound = bound_of(row) if is_real else None
        kept = row.seconds is not None and bound is not None and row.seconds <= bound.at_most
        table.add_row(
            row.method,
            _seconds(row.seconds),
            f"{bound.at_most:g} s: {'kept' if kept else 'NOT kept'}" if bound is not None else "",
            _seconds(row.plain_seconds),
            _seconds(row.floor_seconds),
            f"{row.extra_gb:.2f} GB" if row.extra_gb is not None else "",
            f"{row.off_the_cpu:.0e}" if row.off_the_cpu is not None else "",
            row.left_out,
        )
    return table


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One sentence for each bound that was asked for."""
    by_case = {(row.model, row.method): row for row in rows}
    said = []
    for bound in BOUNDS:
        row = by_case.get((bound.model, bound.method))
        what = f"{bound.method}, {MODELS[bound.model].title}"
        if row is None or row.seconds is None:
            said.append(f"not measured: {what}")
        else:
            word = "kept" if row.seconds <= bound.at_most else "NOT kept"
            said.append(f"{word}: {what}: {row.seconds:.3g} s, at most {bound.at_most:g} s")
    compared = [row for row in rows if row.off_the_cpu is not None]
    far = [row for row in compared if not row.off_the_cpu <= allowed_off(method_of(row))]
    listed = ", ".join(f"{row.method} on {row.model} {row.off_the_cpu:.0e}" for row in far)
    exceptions = f", but for {listed}" if far else ""
    said.append(f"{'NOT kept' if far else 'kept'}: the values of the CPU, {len(compared)} cases{exceptions}")
    return said


def allowed_off(method: Method) -> float:
    """The relative difference from the CPU that a merge on the device may have."""
    return OFF_ELEMENTWISE if method.elementwise else OFF


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"rates, {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--shapes", default="real", choices=["real", "tiny"], help="tiny: with sides of a 64th")
    parser.add_argument("--seconds", default=110.0, type=float, help="for each part")
    parser.add_argument("--output", default=Path("gpu.csv"), type=Path)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - {"rates", *MODELS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts: rates, {', '.join(MODELS)}")
    if chosen.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shapes tiny runs the same code")
    parts = chosen.parts or ["rates", *MODELS]
    is_real = chosen.shapes == "real"
    card, console, rows = Card(chosen.device), Console(width=130, highlight=False), []
    rates = card.rates(PRODUCTS[chosen.shapes]) if "rates" in parts else None
    if rates is not None:
        console.print(card_table(card, rates, chosen.shapes))
    for key, full in MODELS.items():
        if key in parts:
            model = full if is_real else full.tiny()
            found = list(measured(key, model, card, rates, chosen.seconds))
            title = full.title if is_real else f"{full.title}, sides of a 64th"
            console.print(model_table(title, found, is_real))
            rows += found
    with chosen.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    if is_real:
        console.print("\n".join(verdicts(rows)))
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def _in_words(rates: Rates) -> str:
    return (
        f"products: {rates.double / 1e12:.3g} TFLOP/s in float64, {rates.single / 1e12:.3g} in float32; "
        f"copies: {rates.copied / 1e12:.3g} TB/s"
    )


if __name__ == "__main__":
    main()
