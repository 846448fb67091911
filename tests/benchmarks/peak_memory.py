"""Peak memory of a run by case, from modules on the meta device, which have shapes and no values.

python tests/benchmarks/peak_memory.py

Counted is what is held at once: weights, gradients, Adam's two states, deltas, the merge's own, the merged model, and
in host memory the base of what trains. Activations, which depend on the batch, and the CUDA context are not.
`tests/training/test_peak_memory.py` holds the same sums against what a process takes on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.llama import LLAMA
from lightning_drm.deltas import Parameter, backbone_parameters
from lightning_drm.fusion import Recipe, merging_bytes, too_large_as_a_whole

STATES = 3  # beside each value that trains: its gradient and Adam's two moments
DIFFERENCE = 3  # tensors of float32 while a delta is taken: the weight, its base, and the delta


@dataclass(frozen=True)
class Parts:
    """What a run holds, in bytes.

    Attributes:
        weights: The live module.
        states: Gradients and the optimizer's states of what trains.
        held: The base of what trains, in host memory.
        deltas: All tasks' deltas.
        difference: What it takes to take one delta.
        merging: What it takes to merge one parameter.
        merged: The merged model.
    """

    weights: int
    states: int
    held: int
    deltas: int
    difference: int
    merging: int
    merged: int

    @classmethod
    def of(cls, module: nn.Module, head: Sequence[str], recipe: Recipe, num_tasks: int, device: torch.device) -> Parts:
        """Those of a module that is trained for some tasks.

        Args:
            module: The module, with its adapters, on any device.
            head: Names of its head.
            recipe: How the tasks are merged.
            num_tasks: How many there are.
            device: Where they are merged.
        """
        parameters = backbone_parameters(module, head)
        trained = {name: parameter for name, parameter in parameters.items() if _gets_a_delta(parameter)}
        tasks = [str(task) for task in range(num_tasks)]
        ranks = {name: p.adapter_rank * num_tasks for name, p in trained.items() if p.adapter_rank is not None}
        dense = {name: p.tensor for name, p in trained.items() if name not in ranks}
        treatments = {name: recipe.treatment(name, p.kind, tasks) for name, p in trained.items()}
        shapes = {name: tuple(p.tensor.shape) for name, p in trained.items()}
        factors = sum(rank * sum(trained[name].tensor.shape) for name, rank in ranks.items())
        return cls(
            weights=sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]),
            states=STATES * sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad),
            held=sum(tensor.nbytes for tensor in dense.values()),
            deltas=4 * (factors + num_tasks * sum(tensor.numel() for tensor in dense.values())),
            difference=4 * DIFFERENCE * max((tensor.numel() for tensor in dense.values()), default=0),
            merging=merging_bytes(
                treatments,
                shapes,
                num_tasks,
                device,
                ranks=ranks,
                in_pieces=too_large_as_a_whole(treatments, shapes, device),
            ),
            merged=sum(parameter.tensor.nbytes for parameter in parameters.values()),
        )

    @property
    def training(self) -> int:
        """On the device while a task trains, beside activations and the other tasks' deltas."""
        return self.weights + self.states


@dataclass(frozen=True)
class Peaks:
    """Where a run on a card keeps things, and what that takes, in bytes.

    Attributes:
        deltas_on: Where deltas wait.
        merged_on: Where the merged model is built.
        collecting: On the device, while the last task is collected.
        fusing: On the device, while all are merged, beside the last task's module and optimizer.
        host: In host memory, at most.
    """

    deltas_on: Literal["device", "host"]
    merged_on: Literal["device", "host"]
    collecting: int
    fusing: int
    host: int

    @classmethod
    def on_card(cls, parts: Parts, card: float) -> Peaks:
        """What ``store="auto"`` without a run folder makes of a card with so many bytes.

        Args:
            parts: What is held.
            card: The card's memory.
        """
        deltas_stay = parts.training + parts.difference + parts.deltas <= card
        kept = parts.training + (parts.deltas if deltas_stay else 0)
        merged_stays = kept + parts.merging + parts.merged <= card
        return cls(
            "device" if deltas_stay else "host",
            "device" if merged_stays else "host",
            kept + parts.difference,
            kept + parts.merging + (parts.merged if merged_stays else 0),
            parts.held + (0 if deltas_stay else parts.deltas) + (0 if merged_stays else parts.merged),
        )


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    title: str
    module: nn.Module
    num_tasks: int
    card: float


def llama(lora: bool) -> nn.Module:
    """Llama-3.1-8B in bfloat16, all of it trained, or LoRA of rank 16 on every linear layer of its blocks."""
    with torch.device("meta"):
        module = LlamaForCausalLM(LLAMA).to(torch.bfloat16)
        if lora:
            targets = r".*\.(q|k|v|o|gate|up|down)_proj"
            inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), module)
    return module


def vision(hidden: int, layers: int, patch: int) -> nn.Module:
    """CLIP's vision tower, all of it trained in float32."""
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        patch_size=patch,
    )
    with torch.device("meta"):
        return CLIPVisionModel(config)


def cases() -> list[Case]:
    return [
        Case("ViT-B/32 × 8, full", vision(768, 12, 32), 8, 24e9),
        Case("ViT-L/14 × 8, full", vision(1024, 24, 14), 8, 24e9),
        Case("Llama-3.1-8B × 5, LoRA r = 16, bf16", llama(lora=True), 5, 24e9),
        Case("Llama-3.1-8B × 4, full, bf16", llama(lora=False), 4, 80e9),
    ]


def rows(recipe: Recipe, device: torch.device) -> list[list[str]]:
    """The lines of the table, in GB."""
    found = []
    for case in cases():
        parts = Parts.of(case.module, [], recipe, case.num_tasks, device)
        peaks = Peaks.on_card(parts, case.card)
        sizes = (parts.training, peaks.collecting, peaks.fusing, peaks.host)
        places = [peaks.deltas_on, peaks.merged_on]
        found.append([case.title, f"{case.card / 1e9:.0f}", *(f"{size / 1e9:.1f}" for size in sizes), *places])
    return found


HEADER = ["case", "card", "training", "collecting", "fusing", "host", "deltas wait on", "merged model built on"]


def main() -> None:
    table = Table(*HEADER, title="Peak memory in GB, DRM")
    for row in rows(Recipe(), torch.device("cuda")):
        table.add_row(*row)
    Console(width=130).print(table)


def _gets_a_delta(parameter: Parameter) -> bool:
    return parameter.adapter is not None or parameter.tensor.requires_grad


if __name__ == "__main__":
    main()
