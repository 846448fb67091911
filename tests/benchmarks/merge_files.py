"""Merging whole checkpoints of a Llama beside a plain streaming loop: seconds, throughput and peak memory of each.

    python tests/benchmarks/merge_files.py                                  # 271 M parameters, 4 tasks, float32
    python tests/benchmarks/merge_files.py --layers 24 --width 2048 --inner 5632 --methods TaskArithmetic

The checkpoints are random and seeded, written to a temporary folder and deleted after. Each run is a process of its
own, from its first import to its last byte, after the files were read once; so peak memory is that process's. A merge
is the command that a user gives. The loop reads all, averages, and writes, one parameter at a time and no more than
torch and safetensors imported: what no merge of these files can avoid. ``start`` is the command with ``--dry_run``:
what it takes before the first byte is merged, most of it imports of torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

METHODS = ["TaskArithmetic", "DARETIES --drm.method.density 0.5", "TIES"]


def shapes(layers: int, width: int, inner: int, words: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's weights, one dictionary for each file."""
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,), "lm_head.weight": (words, width)}
    ]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        attention = {f"{at}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        mlp = {f"{at}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        norms = {f"{at}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
        files.append({**attention, **mlp, f"{at}.mlp.down_proj.weight": (width, inner), **norms})
    return files


def write_checkpoints(folder: Path, sizes: argparse.Namespace) -> int:
    """Writes a base and its finetunes, file by file; returns one checkpoint's bytes."""
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": sizes.width},
        **{"num_attention_heads": sizes.width // 64, "num_hidden_layers": sizes.layers, "vocab_size": sizes.words},
        **{"intermediate_size": sizes.inner, "tie_word_embeddings": False, "dtype": "float32"},
    }
    files = shapes(sizes.layers, sizes.width, sizes.inner, sizes.words)
    models = ["base", *(f"task{i}" for i in range(sizes.tasks))]
    for model in models:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config))
        names = {name: f"model-{i:05}.safetensors" for i, part in enumerate(files) for name in part}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for i, part in enumerate(files):
        generator = torch.Generator().manual_seed(i)
        base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in part.items()}
        for model in models:
            if model != "base":
                tensors = {name: v + 1e-3 * torch.randn(v.shape, generator=generator) for name, v in base.items()}
            else:
                tensors = base
            save_file(tensors, folder / model / f"model-{i:05}.safetensors", {"format": "pt"})
    return sum(4 * torch.Size(shape).numel() for part in files for shape in part.values())


def loop(folder: Path, tasks: int) -> None:
    """Read all, average, write."""
    models = [folder / "base", *(folder / f"task{i}" for i in range(tasks))]
    output = folder / "out"
    output.mkdir()
    for file in sorted(models[0].glob("*.safetensors")):
        with (output / file.name).open("wb") as stream, file.open("rb") as source:
            length = source.read(8)
            header = source.read(int.from_bytes(length, "little"))
            stream.write(length + header)
            offsets = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name[0] != "_"}
            for name in sorted(offsets, key=lambda name: offsets[name]):
                total = None
                for model in models:
                    with safe_open(model / file.name, framework="pt") as part:
                        value = part.get_tensor(name)
                        total = value.clone() if total is None else total.add_(value)
                stream.write(total.div_(len(models)).numpy().data)


def merge_command(folder: Path, tasks: int, method: str) -> list[str]:
    """The same files, merged."""
    paths = [f"--models.task{i}={folder / f'task{i}'}" for i in range(tasks)]
    where = [f"--base={folder / 'base'}", f"--output={folder / 'out'}"]
    return [sys.executable, "-m", "lightning_drm", "merge", *where, *paths, "--drm.method", *method.split()]


def measure(folder: Path, command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GB of one run in a process of its own, interpreter and imports included."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise subprocess.CalledProcessError(status, command)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"layers": 16, "width": 1024, "inner": 2816, "words": 32_000, "tasks": 4, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="Methods with their options.")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        loop(Path(given.loop), given.tasks)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In another process: one that is started begins with its parent's peak memory.
        size = get_context("spawn").Pool(1).apply(write_checkpoints, (folder, given))
        moved = (given.tasks + 2) * size / 1e9
        largest = max(
            4 * torch.Size(s).numel()
            for part in shapes(1, given.width, given.inner, given.words)
            for s in part.values()
        )
        print(
            f"{size / 4e6:.0f} M parameters, {size / 1e9:.2f} GB × {given.tasks} tasks, {os.cpu_count()} cores, "
            f"the largest layer's stack {largest * given.tasks / 1e9:.2f} GB"
        )
        for file in folder.rglob("*.safetensors"):  # into the page cache, as far as it goes
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
        plain = [sys.executable, __file__, "--loop", str(folder), "--tasks", str(given.tasks)]
        for _ in range(given.rounds):
            floor, peak = measure(folder, plain)
            print(f"plain loop: {floor:.1f} s, {moved / floor:.2f} GB/s, peak {peak:.2f} GB", flush=True)
            start, _ = measure(folder, [*merge_command(folder, given.tasks, given.methods[0]), "--dry_run"])
            print(f"start: {start:.1f} s", flush=True)
            for method in given.methods:
                seconds, peak = measure(folder, merge_command(folder, given.tasks, method))
                rate = f"{seconds / floor:.2f} × the loop, {moved / seconds:.2f} GB/s"
                print(f"{method}: {seconds:.1f} s = {rate}, peak {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
