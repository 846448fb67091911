"""Peak memory of one merge: what it holds at most beyond its inputs, in units of them.

Measured on the second of two such merges in a process of their own: what libraries load and allocate once, and keep
for all layers of a model, is not counted.

python tests/benchmarks/memory.py "DRM()" 3072 768 8
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def extra_share(method: str, *sizes: int) -> float:
    """Run this file, and read the number that it prints."""
    command = [sys.executable, str(Path(__file__)), method, *map(str, sizes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(expression: str, rows: int, columns: int, num_tasks: int) -> None:
    import ctypes
    import resource

    import torch

    import lightning_drm.merging as merging

    method = eval(expression, vars(merging))
    # Freed memory goes back at once, so that the resident size is what is in use.
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    deltas = [torch.randn(rows, columns) for _ in range(num_tasks)]
    method.merge(deltas)
    statm = Path("/proc/self/statm").read_text().split()
    before = int(statm[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    method.merge(deltas)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print((peak - before) / (4 * rows * columns * num_tasks))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
