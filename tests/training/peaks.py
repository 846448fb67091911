"""Run by test_peak_memory in a process of its own: what collecting and fusing take on a CPU, and what is expected.

python peaks.py full|lora
"""

import ctypes
import gc
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.peak_memory import Parts
from lightning_drm import DRM, MergeSession

CPU, TASKS = torch.device("cpu"), ["a", "b", "c"]


class Network(nn.Module):
    """Layers of about the same size, of which those beside the last are a backbone."""

    head_names = ("head",)

    def __init__(self, width: int, lora: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))
        self.head = nn.Linear(width, 2)
        if lora:
            inject_adapter_in_model(LoraConfig(r=8, target_modules=r"backbone\..*"), self)

    def train_once(self) -> torch.optim.Optimizer:
        """A step of Adam, which leaves gradients and two moments."""
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return optimizer


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The most memory that this process holds within a block, beyond some number of bytes."""

    def __init__(self, beyond: int) -> None:
        self._beyond = beyond
        self.bytes = 0

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return self

    def __exit__(self, *_: object) -> None:
        status = Path("/proc/self/status").read_text()
        most = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        self.bytes = most - self._beyond


def run(width: int, lora: bool) -> dict[str, object]:
    """Trains, collects and fuses, with the last module and its optimizer alive."""
    torch.manual_seed(0)
    before = resident()
    session = MergeSession(TASKS, DRM(), store="device")
    for task in TASKS:
        module = optimizer = None  # before the next ones come
        torch.manual_seed(0)
        module = Network(width, lora)
        session.note_base(module, task)
        optimizer = module.train_once()
        with Peak(before) as collecting:
            session.collect(module, task)
    with Peak(before) as fusing:
        merged = session.fuse()
    parts = Parts.of(module, ["head"], session.recipe, len(TASKS), CPU)
    assert optimizer is not None
    assert merged.task_names == TASKS
    return {"parts": asdict(parts), "collecting": collecting.bytes, "fusing": fusing.bytes}


if __name__ == "__main__":
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory goes back at once
    torch.set_num_threads(1)
    run(64, sys.argv[1] == "lora")  # what libraries load and allocate once
    print(json.dumps(run(1024, sys.argv[1] == "lora")))
