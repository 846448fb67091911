"""Run by test_growth in a process of its own: many fits, then many merges, and how much memory each kind leaves behind.

python growth.py FOLDER
"""

import ctypes
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRM, DRMMergeCallback, merge_checkpoints


def resident() -> float:
    """Memory of this process in MB, without what its allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def fit() -> None:
    """One task of two."""
    global merge
    if not merge.missing:
        merge = DRMMergeCallback(("one", "two"), method=DRM(density=0.5))
    trainer = quiet_trainer(max_steps=2, callbacks=[merge.for_task(merge.missing[0])])
    trainer.fit(VectorTask(), Vectors(0))


def merge_files(folder: Path) -> None:
    paths = {task: folder / f"{task}.safetensors" for task in ("one", "two", "three")}
    merge_checkpoints(folder / "base.safetensors", paths, folder / "merged", DRM(), overwrite=True)


def growth(work: Callable[[], None], warm_up: int, count: int) -> float:
    for _ in range(warm_up):
        work()
    before = resident()
    for _ in range(count):
        work()
    return resident() - before


if __name__ == "__main__":
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for seed, name in enumerate(("base", "one", "two", "three")):
        generator = torch.Generator().manual_seed(seed)
        weights = {f"layer{i}.weight": torch.randn(64, 48, generator=generator) for i in range(4)}
        save_file(weights, place / f"{name}.safetensors")
    merge = DRMMergeCallback(("one", "two"), method=DRM(density=0.5))
    found = {"fits": growth(fit, 20, 100), "merges": growth(lambda: merge_files(place), 10, 50)}
    (place / "growth.json").write_text(json.dumps(found))
