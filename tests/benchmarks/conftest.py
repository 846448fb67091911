"""Benchmarks compare with a plain implementation in the same run, and print ratios; no time is a pass or a fail.

    pytest tests/benchmarks --benchmark-only -s

Both are timed alternately, so that a busy machine slows both; the best of the rounds counts. Peak memory is what the
process holds at most beyond what it held before, measured in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
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
    """Best wall-clock seconds of each, taken in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


class Comparison:
    """Times this package's way with pytest-benchmark, and others in turns with it; prints the ratios."""

    def __init__(self, benchmark, capsys: pytest.CaptureFixture[str]) -> None:
        self._benchmark = benchmark
        self._capsys = capsys

    def __call__(self, title: str, ours: Run, others: dict[str, Run], rounds: int = 3) -> dict[str, float]:
        ours()  # libraries start their threads, allocators their pools
        times = interleaved({"ours": ours, **others}, rounds)
        self._benchmark.pedantic(ours, rounds=1, iterations=1)
        self._benchmark.extra_info.update(
            {f"{name}_s": seconds for name, seconds in times.items()}
            | {f"{name}_over_ours": seconds / times["ours"] for name, seconds in times.items()}
        )
        ratios = ", ".join(f"{name} {times[name]:.3f} s = {times[name] / times['ours']:.2f} ×" for name in others)
        self.say(f"{title}: ours {times['ours']:.3f} s; {ratios}")
        return times

    def say(self, line: str) -> None:
        with self._capsys.disabled():
            print(f"\n  {line}")


@pytest.fixture
def compare(benchmark, capsys) -> Comparison:
    return Comparison(benchmark, capsys)


def total_seconds(times: Sequence[dict[str, float]], name: str) -> float:
    return sum(entry[name] for entry in times)
