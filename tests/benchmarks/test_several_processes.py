"""A merge from files on two processes of one thread each, against one: the layers of a ViT-B/32, eight tasks, DRM.

Both are timed from the plan to the finished folder, in processes that have imported everything and found each other:
starting Python takes the same few seconds for a model of any size. They take turns, and the best of each counts, as in
the other benchmarks.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.timing import make_deltas

NUM_TASKS = 8
NUM_BLOCKS = 4  # an even number: three quarters of a block are one layer, which one process merges
BLOCK = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)}
SCRIPT = """
import json, sys, time
from lightning_drm import DRM, merge_checkpoints
from lightning_drm.distributed.launch import started_together
base, output, direction, *paths = sys.argv[1:]
models = {str(task): path for task, path in enumerate(paths)}
with started_together() as ranks:
    ranks.wait()
    start = time.perf_counter()
    merge_checkpoints(base, models, output, DRM(direction), ranks=ranks)
    if ranks.is_first:
        print(time.perf_counter() - start)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base and its finetunes, in files that are in the page cache."""
    folder = tmp_path_factory.mktemp("vit")
    deltas = {
        f"blocks.{block}.{name}.weight": make_deltas(shape, NUM_TASKS, seed=block)
        for block in range(NUM_BLOCKS)
        for name, shape in BLOCK.items()
    }
    save_file({name: torch.zeros_like(parts[0]) for name, parts in deltas.items()}, folder / "base.safetensors")
    for task in range(NUM_TASKS):
        save_file({name: parts[task] for name, parts in deltas.items()}, folder / f"{task}.safetensors")
    return folder


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_two_processes(benchmark, capsys, files, tmp_path, direction):
    models = [files / f"{task}.safetensors" for task in range(NUM_TASKS)]

    def seconds(num_processes):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        script = tmp_path / "merge.py"
        script.write_text(SCRIPT)
        output = tmp_path / str(num_processes)
        shutil.rmtree(output, ignore_errors=True)  # of the round before
        paths = [files / "base.safetensors", output, direction, *models]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *torchrun, script, *paths]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    times = {1: float("inf"), 2: float("inf")}

    def take_turns():
        for count in times:
            times[count] = min(times[count], seconds(count))

    benchmark.pedantic(take_turns, rounds=2)
    one, two = (load_file(tmp_path / str(count) / "model.safetensors") for count in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    benchmark.extra_info.update(speedup=times[1] / times[2])
    with capsys.disabled():
        print(f"\n  DRM {direction}: 1 × 1 {times[1]:.1f} s, 2 × 1 {times[2]:.1f} s: {times[1] / times[2]:.2f} ×")
