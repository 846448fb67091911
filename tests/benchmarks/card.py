"""A device under measurement: its clock, its memory, and the rates that no program on it exceeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Rates:
    """What a card does per second.

    Attributes:
        double: Operations of a product of doubles.
        single: Operations of a product in float32.
        copied: Bytes read and written by a copy.
    """

    double: float
    single: float
    copied: float


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        seconds: The median of the rounds.
        peak_bytes: The most that tensors took beside those that were there before, of all rounds; ``None`` on a CPU,
            which does not count.
    """

    seconds: float
    peak_bytes: int | None


class Card:
    """A CUDA device, or the CPU in its place.

    Args:
        device: Which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"

    @property
    def name(self) -> str:
        """What it calls itself, and the version of PyTorch."""
        model = torch.cuda.get_device_name(self.device) if self._is_cuda else f"CPU, {torch.get_num_threads()} threads"
        return f"{model}, torch {torch.__version__}"

    def measure(self, work: Callable[[], object], rounds: int = 3, long: float = 2.0) -> Measured:
        """Times some work, after a first round that warms up.

        Args:
            work: What is done; its result is dropped before the next round.
            rounds: How many rounds are timed.
            long: A first round of so many seconds is the only one, and counts.
        """
        if self._is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        times = [self._once(work)]
        if times[0] < long:
            times = [self._once(work) for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated(self.device) - before if self._is_cuda else None
        return Measured(statistics.median(times), peak)

    def free(self) -> None:
        """Gives back what the allocator has kept."""
        if self._is_cuda:
            torch.cuda.empty_cache()

    def rates(self, size: int) -> Rates:
        """Measures products and copies of square matrices.

        Args:
            size: Their side.
        """
        matrix = torch.randn(size, size, device=self.device)
        double = matrix.double()
        operations = 2.0 * size**3
        return Rates(
            double=operations / self.measure(lambda: double @ double).seconds,
            single=operations / self.measure(lambda: matrix @ matrix).seconds,
            copied=2.0 * matrix.nbytes / self.measure(lambda: matrix.clone(), rounds=10).seconds,
        )

    def eigenproblem(self, size: int, dtype: torch.dtype) -> Measured:
        """Measures `torch.linalg.eigh` of one Gram matrix."""
        rows = torch.randn(size, size, dtype=torch.float64, device=self.device)
        matrix = (rows @ rows.T).to(dtype)
        del rows
        return self.measure(lambda: torch.linalg.eigh(matrix))

    def _once(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        result = work()
        if self._is_cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        del result
        return seconds
