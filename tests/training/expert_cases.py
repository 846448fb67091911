"""What each rank of `test_experts` does; in a module of its own, which the ranks' processes can import by name."""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from helpers import experts
from lightning_drm import MergeSession
from lightning_drm.distributed.launch import started_together

TASKS = ["a", "b"]


def check(merged: nn.Module, base: PreTrainedModel, tuned: list[nn.Module], tolerance: float, noise: float) -> None:
    """Every expert is DRM of the tasks' deltas of that expert; embeddings of both kinds are the average."""
    start = dict(base.named_parameters())
    found = {name: next(value for key, value in merged.named_parameters() if key.endswith(name)) for name in start}
    deltas = [experts.deltas_of(model, base) for model in tuned]
    stacks = [name for name in start if experts.is_experts(name)]
    assert len(stacks) == 4
    for name in stacks:
        change = (found[name] - start[name]).detach()
        for index in range(experts.NUM_EXPERTS):
            experts.assert_merged(change[index], [delta[name][index] for delta in deltas], tolerance, noise)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        expected = start[name] + sum(delta[name] for delta in deltas) / 2
        torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance)


def sharded(name: str, lora: bool, folder: Path) -> None:
    """What each rank does: collects models that FSDP2 shards, merges its share, and compares the whole."""
    with started_together() as ranks:
        mesh = init_device_mesh("cpu", (ranks.size,))
        base = experts.base_model(name)
        session = MergeSession(TASKS, experts.METHOD, head=[])
        tuned = []
        for seed, task in enumerate(TASKS, 1):
            module = experts.with_lora(base) if lora else copy.deepcopy(base)
            trained = experts.train(copy.deepcopy(module), seed)
            session.keep_module(module, task)
            fully_shard(module, mesh=mesh)
            session.note_base(module)
            whole = dict(trained.named_parameters())
            with torch.no_grad():
                for key, parameter in module.named_parameters():
                    assert isinstance(parameter, DTensor)
                    local = DTensor.from_local(whole[key].data, mesh).redistribute(placements=parameter.placements)
                    parameter.to_local().copy_(local.to_local())
            session.collect(module, task)
            tuned.append(trained)
        merged = session.fuse().task_module("a")
        assert all(isinstance(p, DTensor) for key, p in merged.named_parameters() if experts.is_experts(key))
        full = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in merged.named_parameters()}
        bare = copy.deepcopy(base)
        with torch.no_grad():
            for key, parameter in bare.named_parameters():
                found = [value for own, value in full.items() if own.replace(".base_layer", "").endswith(key)]
                parameter.copy_(found[0])
        check(bare, base, tuned, *((1e-5, 1e-7) if lora else (1e-12, 0.0)))
        (folder / f"{ranks.rank}.right").touch()
