"""Benchmarks compare with a plain implementation in the same run, and print ratios; no time is a pass or a fail.

    pytest tests/benchmarks --benchmark-only

Both are timed in turns, so that a busy machine slows both; the best of the rounds counts. Peak memory is what a process
of its own holds at most beyond its inputs.
"""

from __future__ import annotations

import pytest

from benchmarks.timing import Run, interleaved


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
