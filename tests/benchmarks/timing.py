"""Inputs and stopwatches of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[], object]


def make_deltas(shape: tuple[int, ...], num_tasks: int, seed: int = 0) -> list[Tensor]:
    """Deltas with a part in common, spectra that decay, and sizes that differ, as finetuned weights have."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=g)
    deltas = []
    for task in range(num_tasks):
        delta = 1e-3 * (1 + task / num_tasks) * (0.5 * common + torch.randn(shape, generator=g))
        if len(shape) == 2:
            delta *= torch.linspace(1, 0.1, shape[1])
        deltas.append(delta)
    return deltas


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Best wall-clock seconds of each, taken in turns; in its turn, a short one is repeated for half a second."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            turn = time.perf_counter()
            while (start := time.perf_counter()) - turn < 0.5:
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    return best
