"""Mixtures of experts in a session: every expert of the merged module is merged alone, sharded or not."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import experts
from helpers.ranks import end_codes, start_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_drm import MergeSession
from lightning_drm.distributed.launch import started_together
from lightning_drm.fusion import Override

TASKS = ["a", "b"]
PATIENCE = 120.0


class Holder(nn.Module):
    """A model in a module of one's own, as a LightningModule would have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


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


@pytest.mark.parametrize("store", [None, "disk"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", experts.MODELS)
def test_each_expert_is_merged_alone(name: str, lora: bool, store: str | None, tmp_path: Path) -> None:
    base = experts.base_model(name)
    folder = {"dirpath": tmp_path, "store": store} if store else {}
    session = MergeSession(TASKS, experts.METHOD, **folder, head=[])
    tuned = []
    for seed, task in enumerate(TASKS, 1):
        module = Holder(experts.with_lora(base) if lora else copy.deepcopy(base))
        session.note_base(module)
        tuned.append(experts.train(module, seed).model)
        session.collect(module, task)
    merged = session.fuse().task_module("a")
    check(merged, base, tuned, *((1e-5, 1e-7) if lora else (1e-12, 0.0)))
    if store:
        card = (tmp_path / "merged" / "README.md").read_text()
        rows, columns = base.model.layers[0].mlp.experts.gate_up_proj.shape[1:]
        assert f"- 3 experts of ({rows}, {columns}), in 2 parameters: method, one expert after another" in card
        assert lora or "- output embeddings, in 1 parameter: average" in card


def test_output_embeddings_are_merged_by_the_method_where_that_is_asked_for() -> None:
    base = experts.base_model("mixtral")
    overrides = [Override("lm_head.weight", rule="method")]
    session = MergeSession(TASKS, experts.METHOD, head=[], overrides=overrides)
    tuned = []
    for seed, task in enumerate(TASKS, 1):
        module = copy.deepcopy(base)
        session.note_base(module)
        tuned.append(experts.train(module, seed))
        session.collect(module, task)
    merged = session.fuse().task_module("a")
    deltas = [experts.deltas_of(model, base)["lm_head.weight"] for model in tuned]
    experts.assert_merged((merged.lm_head.weight - base.lm_head.weight).detach(), deltas, 1e-12)


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


@pytest.mark.processes
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ranks_that_shard_experts(name: str, lora: bool, tmp_path: Path) -> None:
    codes = end_codes(start_ranks(sharded, 2, tmp_path, name, lora, tmp_path), PATIENCE)
    errors = "".join((tmp_path / f"{rank}.err").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], errors
    assert all((tmp_path / f"{rank}.right").exists() for rank in range(2)), errors
